"""The COCO figures of masks against pycocotools, on random and on real data; masks in results, tables and dicts."""

import contextlib
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from rich.console import Console

from detkit.data.formats.coco import Coco
from detkit.io.files import write_json
from detkit.structures import ClassList, Detections, Meta, Target
from detkit.tasks.detection.metrics import DetectionEvaluator, DetectionScores, coco_results

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
Case = tuple[list[Detections], list[Target], list[Meta], ClassList]


def ellipses(rng: np.random.Generator, count: int, size: tuple[int, int]) -> np.ndarray:
    """(count, H, W) bool of every size from a few pixels to beyond the image."""
    rows, columns = np.mgrid[: size[0], : size[1]] + 0.5
    centre = rng.uniform(0, 1, (count, 2, 1, 1)) * np.array(size)[:, None, None]
    radius = np.exp(rng.uniform(0.7, 5, (count, 2, 1, 1)))
    return ((rows - centre[:, 0]) / radius[:, 0]) ** 2 + ((columns - centre[:, 1]) / radius[:, 1]) ** 2 <= 1


def boxes_of(masks: np.ndarray) -> torch.Tensor:
    """(N, 4) xyxy around the masks; a whole pixel for empty ones."""
    boxes = np.array([[0, 0, 1, 1]] * len(masks), dtype=np.float32).reshape(-1, 4)
    for box, mask in zip(boxes, masks):
        rows, columns = np.nonzero(mask)
        if len(rows):
            box[:] = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    return torch.from_numpy(boxes)


def perturbed(rng: np.random.Generator, target: Target, num_classes: int, extra: int) -> Detections:
    """Each target found 0 to 2 times, shifted, with a part cut off; some labels wrong, ellipses added, scores tied."""
    assert target.masks is not None
    masks = []
    chosen = np.repeat(np.arange(len(target)), rng.integers(0, 3, len(target)))
    for index in chosen:
        mask = target.masks[index].numpy()
        extent = math.sqrt(mask.sum()) * 0.12 + 1
        mask = np.roll(mask, rng.uniform(-extent, extent, 2).round().astype(int), (0, 1))
        mask[: int(rng.choice([0, 0, mask.shape[0] // 2]))] = False
        masks.append(mask)
    masks += list(ellipses(rng, extra, tuple(target.masks.shape[1:])))
    stacked = np.array(masks, dtype=bool).reshape(-1, *target.masks.shape[1:])
    labels = np.concatenate([target.labels[chosen].numpy(), rng.integers(0, num_classes, extra)])
    labels = np.where(rng.random(len(labels)) < 0.1, rng.integers(0, num_classes, len(labels)), labels)
    scores = torch.tensor(rng.integers(1, 100, len(labels)) / 100).float()
    return Detections(boxes_of(stacked), scores, torch.from_numpy(labels), torch.from_numpy(stacked))


def random_case(seed: int, images: int = 12, num_classes: int = 3) -> Case:
    """Images of different sizes, some without targets or detections, with crowds and areas that are not the masks'."""
    rng = np.random.default_rng(seed)
    detections, targets, metas = [], [], []
    for image_id in rng.permutation(100)[:images].tolist():
        size = (int(rng.integers(60, 200)), int(rng.integers(60, 200)))
        masks = ellipses(rng, int(rng.choice([0, 1, 4, 9])), size)
        count = len(masks)
        target = Target(
            boxes_of(masks),
            torch.tensor(rng.integers(0, num_classes, count)),
            torch.tensor(rng.random(count) < 0.2),
            area=torch.tensor(masks.sum((1, 2)) * rng.uniform(0.7, 1.3, count)).float(),
            masks=torch.from_numpy(masks),
        )
        found = perturbed(rng, target, num_classes, int(rng.choice([0, 3, 8])))
        detections.append(found if rng.random() < 0.9 else found[torch.zeros(len(found), dtype=torch.bool)])
        targets.append(target)
        metas.append(Meta(image_id, f"{image_id}.png", size))
    return detections, targets, metas, ClassList(("a", "b", "c"), (5, 2, 9))


def evaluate(case: Case) -> DetectionScores:
    evaluator = DetectionEvaluator(case[3])
    evaluator.update(*case[:3])
    return evaluator.compute()


def annotation_file(case: Case) -> dict:
    """What a COCO file holds; run lengths by pycocotools."""
    annotations = []
    for target, meta in zip(case[1], case[2]):
        for label, crowd, area, mask in zip(target.labels, target.crowd, target.area, target.masks):
            rle = coco_mask.encode(np.asfortranarray(mask.numpy(), dtype=np.uint8))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": meta.image_id,
                    "category_id": case[3].raw_ids[label],
                    "segmentation": {**rle, "counts": rle["counts"].decode()},
                    "area": area.item(),
                    "iscrowd": int(crowd),
                }
            )
    images = [{"id": meta.image_id, "height": meta.size[0], "width": meta.size[1]} for meta in case[2]]
    return {"images": images, "annotations": annotations, "categories": [{"id": raw} for raw in case[3].raw_ids]}


def reference(content: dict, case: Case, tmp_path: Path) -> COCOeval:
    """pycocotools on the result file that detkit writes, without its boxes."""
    records = [record for found, _, meta, _ in each(case) for record in coco_results(found, meta, case[3])]
    write_json(tmp_path / "results.json", [{k: v for k, v in r.items() if k != "bbox"} for r in records])
    with contextlib.redirect_stdout(io.StringIO()):
        target = COCO()
        target.dataset = content
        target.createIndex()
        evaluation = COCOeval(target, target.loadRes(str(tmp_path / "results.json")), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def each(case: Case) -> list[tuple[Detections, Target, Meta, ClassList]]:
    return [(found, target, meta, case[3]) for found, target, meta in zip(*case[:3])]


def assert_equal_figures(scores: DetectionScores, evaluation: COCOeval, classes: ClassList) -> None:
    assert scores.masks is not None
    assert list(scores.masks) == list(scores.coco)
    expected = np.where(evaluation.stats == -1, np.nan, evaluation.stats)
    np.testing.assert_allclose(list(scores.masks.values()), expected, rtol=0, atol=1e-12)
    positions = {raw: index for index, raw in enumerate(evaluation.params.catIds)}
    for row, raw_id in zip(scores.per_class, classes.raw_ids):
        precision = evaluation.eval["precision"][:, :, positions[raw_id], 0, -1]
        pair = (np.nan, np.nan) if (precision == -1).all() else (precision.mean(), precision[0].mean())
        np.testing.assert_allclose((row.mask_AP, row.mask_AP50), pair, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_equals_pycocotools(seed: int, tmp_path: Path) -> None:
    case = random_case(seed)
    scores = evaluate(case)
    assert_equal_figures(scores, reference(annotation_file(case), case, tmp_path), case[3])
    assert scores.masks != scores.coco
    # Masks change nothing about the figures of the boxes.
    without = [replace(found, masks=None) for found in case[0]], [replace(target, masks=None) for target in case[1]]
    plain = evaluate((*without, *case[2:]))
    np.testing.assert_equal(plain.coco, scores.coco)
    assert plain.masks is None
    assert plain.per_class[0].mask_AP is None


@pytest.mark.parametrize(
    ("folder", "split", "images", "annotations"),
    [("pennfudan", "val", "images/{split}", None), ("coco_tiny", "val2017", "{split}", 40)],
)
def test_equals_pycocotools_on_real_masks(
    folder: str, split: str, images: str, annotations: int | None, tmp_path: Path
) -> None:
    if not (DATA / folder).is_dir():
        pytest.skip(f"needs the shared data {DATA / folder}")
    data = Coco(str(DATA / folder), split, masks=True, images=images)
    rng = np.random.default_rng(7)
    samples = [data[index] for index in range(len(data))][:annotations]
    targets, metas = [sample.target for sample in samples], [sample.meta for sample in samples]
    if folder == "coco_tiny":
        assert any(target.crowd.any() for target in targets)
    detections = [perturbed(rng, target, len(data.classes), 3) for target in targets]
    case = (detections, targets, metas, data.classes)
    # The reference reads polygons and run lengths from the file as it is.
    content = json.loads((DATA / folder / f"annotations/instances_{split}.json").read_text())
    ids = {meta.image_id for meta in metas}
    content["images"] = [image for image in content["images"] if image["id"] in ids]
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] in ids]
    scores = evaluate(case)
    assert_equal_figures(scores, reference(content, case, tmp_path), data.classes)
    assert 0.1 < scores.masks["mAP50"] < 1


def square(size: int = 40) -> torch.Tensor:
    """(1, 100, 100): one square of `size` pixels at the top left."""
    mask = torch.zeros(1, 100, 100, dtype=torch.bool)
    mask[0, :size, :size] = True
    return mask


CLASSES = ClassList.from_names(["cat"])
META = Meta(1, "1.png", (100, 100))
LABEL = torch.tensor([0])
BOX = torch.tensor([[0.0, 0.0, 40.0, 40.0]])


def one_image(found: torch.Tensor | None, target: torch.Tensor | None, **flags: torch.Tensor) -> DetectionScores:
    detections = Detections(BOX, torch.tensor([0.9]), LABEL, found)
    return evaluate(([detections], [Target(BOX, LABEL, masks=target, **flags)], [META], CLASSES))


def test_masks_and_boxes_are_scored_apart() -> None:
    scores = one_image(square(20), square())
    assert (scores.coco["mAP"], scores.masks["mAP"]) == (pytest.approx(1), 0)
    assert scores.decisive is scores.masks
    assert one_image(square(), square()).masks["mAP"] == pytest.approx(1)
    assert one_image(None, square()).decisive["mAP"] == pytest.approx(1)


@pytest.mark.parametrize(("found", "target"), [(None, None), (None, square()), (square(), None)])
def test_without_masks_on_either_side_there_are_no_figures(
    found: torch.Tensor | None, target: torch.Tensor | None
) -> None:
    scores = one_image(found, target)
    assert scores.masks is None
    assert not any("mask" in name for name in scores.as_dict())


def test_a_difficult_mask_is_neither_right_nor_wrong() -> None:
    scores = one_image(square(), square(), difficult=torch.tensor([True]))
    assert math.isnan(scores.masks["mAP"])
    both = Target(
        torch.cat([BOX, BOX + 50]),
        LABEL.repeat(2),
        difficult=torch.tensor([True, False]),
        masks=torch.cat([square(), square().roll((50, 50), (1, 2))]),
    )
    found = Detections(both.boxes, torch.tensor([0.9, 0.8]), both.labels, both.masks)
    assert evaluate(([found], [both], [META], CLASSES)).masks["mAP"] == pytest.approx(1)


def test_nothing_detected_scores_zero() -> None:
    target = Target(BOX, LABEL, masks=square())
    scores = evaluate(([Detections.empty()], [target], [META], CLASSES))
    assert scores.masks["mAP"] == scores.per_class[0].mask_AP50 == 0


def test_masks_of_some_images_only_or_of_another_size_are_refused() -> None:
    with_mask, without = Detections(BOX, torch.tensor([0.9]), LABEL, square()), Detections(BOX, torch.ones(1), LABEL)
    targets = [Target(BOX, LABEL, masks=square())] * 2
    metas = [META, replace(META, image_id=2)]
    with pytest.raises(ValueError, match="the detections of some images have masks"):
        evaluate(([with_mask, without], targets, metas, CLASSES))
    with pytest.raises(ValueError, match="the targets of some images have masks"):
        evaluate(([with_mask] * 2, [targets[0], Target(BOX, LABEL)], metas, CLASSES))
    with pytest.raises(ValueError, match=r"image 1 \(1\.png\) have masks of \(90, 100\), the targets of \(100, 100\)"):
        one_image(square()[:, :90], square())


def test_the_figures_as_a_flat_dict_and_as_a_table() -> None:
    scores = one_image(square(34), square())
    figures = scores.as_dict()
    # 34 x 34 of 40 x 40 pixels are an IoU of 0.7225, above five of COCO's ten.
    assert (figures["mask_mAP"], figures["mask_mAP50"], figures["mask_mAP75"]) == (pytest.approx(0.5), 1, 0)
    assert (figures["mask_AP/cat"], figures["mask_AP50/cat"]) == (pytest.approx(0.5), 1)
    assert all(f"mask_{name}" in figures for name in scores.coco)
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(scores.table())
    text = console.export_text()
    assert text.count("mask ") == 2
    # All columns fit a terminal, even with their widest figures.
    assert "…" not in text
    assert "masks: mAP75 0.0" in text
    assert "50.0" in text


def test_results_carry_compressed_run_lengths() -> None:
    found = Detections(BOX, torch.tensor([0.25]), LABEL, square())
    (record,) = coco_results(found, META, CLASSES)
    assert set(record) == {"image_id", "category_id", "bbox", "score", "segmentation"}
    assert record["segmentation"]["size"] == [100, 100]
    assert isinstance(record["segmentation"]["counts"], str)
    assert np.array_equal(coco_mask.decode(record["segmentation"]).astype(bool), square()[0].numpy())
    assert "segmentation" not in coco_results(replace(found, masks=None), META, CLASSES)[0]


def test_the_evaluator_gives_the_results_in_the_order_of_the_images() -> None:
    detections, targets, metas, classes = case = random_case(3)
    evaluator = DetectionEvaluator(classes)
    for index in range(len(metas)):
        evaluator.update(detections[index : index + 1], targets[index : index + 1], metas[index : index + 1])
    expected = [record for found, _, meta, _ in each(case) for record in coco_results(found, meta, classes)]
    assert evaluator.results() == expected
    assert expected
