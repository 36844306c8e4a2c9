"""The COCO figures against pycocotools and torchmetrics, on random and on real data."""

import contextlib
import io
import json
import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from rich.console import Console

from detkit.errors import DataError
from detkit.io.files import write_json
from detkit.structures import ClassList, Detections, Meta, Target
from detkit.tasks.detection.metrics import (
    DetectionEvaluator,
    DetectionScores,
    coco_results,
)

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
COCO_NAMES = [
    *("mAP", "mAP50", "mAP75", "mAP_small", "mAP_medium", "mAP_large"),
    *("AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large"),
]
Case = tuple[list[Detections], list[Target], list[Meta], ClassList]


def meta_of(image_id: int | str) -> Meta:
    return Meta(image_id, f"{image_id}.jpg", (480, 640))


def random_boxes(rng: np.random.Generator, count: int) -> torch.Tensor:
    """Sizes from 4 to 400 pixels, so that all of COCO's ranges of area occur."""
    corner = rng.uniform(0, 400, (count, 2))
    return torch.tensor(np.concatenate([corner, corner + np.exp(rng.uniform(1.4, 6, (count, 2)))], 1)).float()


def jittered(rng: np.random.Generator, target: Target, num_classes: int, extra: int) -> Detections:
    """Each ground truth found 0 to 2 times, moved by up to 15 % of its size; some labels wrong, and random boxes added.

    Scores are in hundredths: ties within an image and between images are common.
    """
    chosen = np.repeat(np.arange(len(target)), rng.integers(0, 3, len(target)))
    boxes = target.boxes[chosen]
    size = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    boxes = boxes + size * torch.tensor(rng.uniform(-0.15, 0.15, boxes.shape)).float()
    labels = target.labels[chosen]
    labels = torch.where(torch.tensor(rng.random(len(labels)) < 0.9), labels, torch.randint(num_classes, labels.shape))
    boxes = torch.cat([boxes, random_boxes(rng, extra)])
    labels = torch.cat([labels, torch.tensor(rng.integers(0, num_classes, extra))])
    scores = torch.tensor(rng.integers(1, 100, len(labels)) / 100).float()
    return Detections(boxes, scores, labels)


def random_case(seed: int, images: int = 25, num_classes: int = 4, difficult: float = 0.0) -> Case:
    """Images without targets, without detections and with neither among them; the last class has no target."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    detections, targets = [], []
    for _ in range(images):
        count = int(rng.choice([0, 1, 5, 20]))
        boxes = random_boxes(rng, count)
        target = Target(
            boxes=boxes,
            labels=torch.tensor(rng.integers(0, num_classes - 1, count)),
            crowd=torch.tensor(rng.random(count) < 0.15),
            difficult=torch.tensor(rng.random(count) < difficult),
            area=(boxes[:, 2:] - boxes[:, :2]).prod(1) * torch.tensor(rng.uniform(0.3, 1, count)).float(),
        )
        targets.append(target)
        extra = int(rng.choice([0, 3, 150 if seed == 0 else 10]))
        detections.append(jittered(rng, target, num_classes, extra) if rng.random() < 0.9 else Detections.empty())
    ids = rng.permutation(1000)[:images].tolist()
    classes = ClassList(tuple("abcdefgh"[:num_classes]), (7, 3, 90, 1, 2, 4, 5, 6)[:num_classes])
    return detections, targets, [meta_of(i) for i in ids], classes


def evaluate(case: Case, batch: int = 4) -> DetectionScores:
    detections, targets, metas, classes = case
    evaluator = DetectionEvaluator(classes)
    for start in range(0, len(metas), batch):
        end = start + batch
        evaluator.update(detections[start:end], targets[start:end], metas[start:end])
    return evaluator.compute()


def reference(target: dict, results: list[dict]) -> COCOeval:
    """pycocotools on a COCO annotation file's content and a list of result records."""
    with contextlib.redirect_stdout(io.StringIO()):
        target_coco = COCO()
        target_coco.dataset = target
        target_coco.createIndex()
        evaluation = COCOeval(target_coco, target_coco.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def annotations_of(targets: list[Target], metas: list[Meta], classes: ClassList) -> dict:
    """A COCO annotation file's content."""
    annotations = []
    for target, meta in zip(targets, metas):
        for (x1, y1, x2, y2), label, crowd, area in zip(
            target.boxes.tolist(), target.labels.tolist(), target.crowd.tolist(), target.area.tolist()
        ):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": meta.image_id,
                    "category_id": classes.raw_ids[label],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": area,
                    "iscrowd": int(crowd),
                }
            )
    images = [{"id": meta.image_id} for meta in metas]
    return {"images": images, "annotations": annotations, "categories": [{"id": raw} for raw in classes.raw_ids]}


def all_results(case: Case) -> list[dict]:
    detections, _, metas, classes = case
    return [record for found, meta in zip(detections, metas) for record in coco_results(found, meta, classes)]


def assert_equal_figures(scores: DetectionScores, evaluation: COCOeval, classes: ClassList) -> None:
    assert list(scores.coco) == COCO_NAMES
    expected = np.where(evaluation.stats == -1, np.nan, evaluation.stats)
    np.testing.assert_allclose(list(scores.coco.values()), expected, rtol=0, atol=1e-6)
    by_raw_id = {raw: index for index, raw in enumerate(evaluation.params.catIds)}
    for row, raw_id in zip(scores.per_class, classes.raw_ids):
        precision = evaluation.eval["precision"][:, :, by_raw_id[raw_id], 0, -1]
        expected_pair = (np.nan, np.nan) if (precision == -1).all() else (precision.mean(), precision[0].mean())
        np.testing.assert_allclose((row.AP, row.AP50), expected_pair, rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", range(20))
def test_equals_pycocotools(seed: int) -> None:
    case = random_case(seed)
    scores = evaluate(case)
    assert_equal_figures(scores, reference(annotations_of(*case[1:]), all_results(case)), case[3])
    assert math.isnan(scores.per_class[-1].AP)


def coco_tiny() -> tuple[dict, list[Target], list[Meta], ClassList]:
    content = json.loads((DATA / "coco_tiny/annotations/instances_val2017.json").read_text())
    categories = sorted(content["categories"], key=lambda category: category["id"])
    classes = ClassList(tuple(c["name"] for c in categories), tuple(c["id"] for c in categories))
    targets, metas = [], []
    for image in content["images"]:
        objects = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        xywh = torch.tensor([a["bbox"] for a in objects], dtype=torch.float64).reshape(-1, 4)
        boxes = torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1).float()
        labels = torch.tensor([classes.raw_ids.index(a["category_id"]) for a in objects], dtype=torch.int64)
        crowd = torch.tensor([bool(a["iscrowd"]) for a in objects], dtype=torch.bool)
        area = torch.tensor([a["area"] for a in objects], dtype=torch.float32)
        targets.append(Target(boxes, labels, crowd, area=area))
        metas.append(Meta(image["id"], image["file_name"], (image["height"], image["width"])))
    return content, targets, metas, classes


def test_equals_pycocotools_on_coco_itself() -> None:
    if not (DATA / "coco_tiny").is_dir():
        pytest.skip(f"needs the shared data {DATA / 'coco_tiny'}")
    content, targets, metas, classes = coco_tiny()
    assert any(target.crowd.any() for target in targets)
    rng = np.random.default_rng(5)
    case = ([jittered(rng, target, len(classes), 20) for target in targets], targets, metas, classes)
    # The reference reads the annotation file as it is.
    assert_equal_figures(evaluate(case), reference(content, all_results(case)), classes)


def test_equals_pycocotools_on_voc_data() -> None:
    if not (DATA / "bccd").is_dir():
        pytest.skip(f"needs the shared data {DATA / 'bccd'}")
    classes = ClassList.from_names(["RBC", "WBC", "Platelets"], first_raw_id=1)
    targets, metas = [], []
    for number, name in enumerate((DATA / "bccd/ImageSets/Main/val.txt").read_text().split(), 1):
        objects = list(ElementTree.parse(DATA / f"bccd/Annotations/{name}.xml").iter("object"))
        boxes = [
            [float(o.findtext(f"bndbox/{key}", "")) - key.endswith("min") for key in ("xmin", "ymin", "xmax", "ymax")]
            for o in objects
        ]
        labels = [classes.names.index(o.findtext("name", "")) for o in objects]
        targets.append(Target(torch.tensor(boxes).reshape(-1, 4), torch.tensor(labels, dtype=torch.int64)))
        metas.append(meta_of(number))
    rng = np.random.default_rng(6)
    case = ([jittered(rng, target, 3, 5) for target in targets], targets, metas, classes)
    assert_equal_figures(evaluate(case), reference(annotations_of(*case[1:]), all_results(case)), classes)


def test_agrees_with_torchmetrics() -> None:
    from torchmetrics.detection import MeanAveragePrecision

    detections, targets, _, _ = case = random_case(101)
    metric = MeanAveragePrecision(
        iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(), rec_thresholds=np.linspace(0, 1, 101).tolist()
    )
    metric.update(
        [{"boxes": d.boxes, "scores": d.scores, "labels": d.labels} for d in detections],
        [{"boxes": t.boxes, "labels": t.labels, "iscrowd": t.crowd.int(), "area": t.area} for t in targets],
    )
    theirs = metric.compute()
    # Their image ids count up in the order of coming, which decides ties between scores.
    metas = [meta_of(index) for index in range(len(targets))]
    ours = evaluate((detections, targets, metas, case[3])).coco
    pairs = {"mAP": "map", "mAP50": "map_50", "mAP75": "map_75", "mAP_small": "map_small", "AR_100": "mar_100"}
    for name, their_name in pairs.items():
        assert ours[name] == pytest.approx(float(theirs[their_name]), abs=1e-6)


def test_the_order_of_images_and_the_size_of_batches_change_nothing() -> None:
    detections, targets, metas, classes = case = random_case(3)
    reverse = (detections[::-1], targets[::-1], metas[::-1], classes)
    np.testing.assert_equal(evaluate(case, batch=7).as_dict(), evaluate(reverse, batch=1).as_dict())


def test_image_ids_may_be_names() -> None:
    detections, targets, metas, classes = random_case(4)
    named = [meta_of(f"{meta.image_id:06}") for meta in metas]
    np.testing.assert_equal(
        evaluate((detections, targets, named, classes)).as_dict(),
        evaluate((detections, targets, metas, classes)).as_dict(),
    )


def one_image(target: Target, detections: Detections) -> DetectionScores:
    return evaluate(([detections], [target], [meta_of(1)], ClassList.from_names(["cat", "dog"])))


BOX = torch.tensor([[10.0, 10.0, 50.0, 50.0]])
CAT = torch.tensor([0])


def test_difficult_targets_are_neither_right_nor_wrong() -> None:
    boxes = torch.cat([BOX, BOX + 100])
    target = Target(boxes, torch.tensor([0, 0]), difficult=torch.tensor([False, True]))
    # The detection on the difficult ground truth scores best: counted as wrong, it would halve the precision.
    found = Detections(boxes, torch.tensor([0.5, 0.9]), torch.tensor([0, 0]))
    scores = one_image(target, found)
    assert (scores.coco["mAP"], scores.voc07, scores.voc12) == pytest.approx((1, 1, 1))
    assert (scores.targets, scores.ignored, scores.detections) == (1, 1, 2)
    # A small box inside the difficult object is wrong, where a crowd region would forgive it.
    inside = Detections(
        torch.cat([BOX, BOX[:, [0, 1, 0, 1]] + torch.tensor([100.0, 100, 110, 110])]), found.scores, CAT.repeat(2)
    )
    assert one_image(target, inside).coco["mAP"] == pytest.approx(0.5)


@pytest.mark.parametrize("seed", range(5))
def test_difficult_targets_as_pycocotools_with_their_flag_set(seed: int) -> None:
    class WithDifficult(COCOeval):
        def _prepare(self) -> None:
            super()._prepare()
            for targets in self._gts.values():
                for truth in targets:
                    truth["ignore"] = truth["iscrowd"] or truth["difficult"]

    case = random_case(seed + 50, difficult=0.3)
    content = annotations_of(*case[1:])
    difficult = [flag for target in case[1] for flag in target.difficult.tolist()]
    for annotation, flag in zip(content["annotations"], difficult):
        annotation["difficult"] = flag
    with contextlib.redirect_stdout(io.StringIO()):
        target_coco = COCO()
        target_coco.dataset = content
        target_coco.createIndex()
        evaluation = WithDifficult(target_coco, target_coco.loadRes(all_results(case)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert_equal_figures(evaluate(case), evaluation, case[3])


def test_no_detections_score_zero_and_say_so() -> None:
    scores = one_image(Target(BOX, CAT), Detections.empty())
    assert scores.coco["mAP"] == scores.voc07 == scores.voc12 == scores.per_class[0].AP == 0
    assert math.isnan(scores.per_class[1].AP)
    assert math.isnan(scores.per_class[1].voc12)
    assert "nothing was detected" in scores.summary


def test_no_targets_score_nan_and_say_so() -> None:
    found = Detections(BOX, torch.tensor([0.9]), CAT)
    scores = one_image(Target.empty(), found)
    assert all(math.isnan(value) for value in [*scores.coco.values(), scores.voc07, scores.voc12])
    assert "no object" in scores.summary
    assert (scores.images, scores.targets, scores.detections) == (1, 0, 1)


def test_neither_targets_nor_detections() -> None:
    assert math.isnan(one_image(Target.empty(), Detections.empty()).coco["mAP"])


def test_no_image_at_all_is_an_error() -> None:
    with pytest.raises(DataError, match="not one image"):
        DetectionEvaluator(ClassList.from_names(["cat"])).compute()


def test_mistakes_are_named() -> None:
    evaluator = DetectionEvaluator(ClassList.from_names(["cat", "dog"]))
    found, target = Detections(BOX, torch.tensor([0.9]), CAT), Target(BOX, CAT)
    evaluator.update([found], [target], [meta_of(5)])
    with pytest.raises(DataError, match=r"image id 5 .* twice.*5\.jpg"):
        evaluator.update([found], [target], [meta_of(5)])
    with pytest.raises(ValueError, match="1 detections, 1 targets and 0 metas"):
        evaluator.update([found], [target], [])
    with pytest.raises(ValueError, match=r"detection of image 6 .* label 2, .* 0 to 1: 0: cat"):
        evaluator.update([Detections(BOX, torch.tensor([0.9]), CAT + 2)], [target], [meta_of(6)])
    with pytest.raises(DataError, match=r"target of image 7 .* label -1"):
        evaluator.update([found], [Target(BOX, CAT - 1)], [meta_of(7)])
    with pytest.raises(ValueError, match=r"image 8 .* not finite"):
        evaluator.update([Detections(BOX * math.nan, torch.tensor([0.9]), CAT)], [target], [meta_of(8)])
    with pytest.raises(ValueError, match="above 10"):
        DetectionEvaluator(ClassList.from_names(["cat"]), max_detections=10)
    assert evaluator.compute().images == 1


def test_max_detections_names_its_recall() -> None:
    evaluator = DetectionEvaluator(ClassList.from_names(["cat"]), max_detections=300)
    count = 200
    boxes = BOX + 60 * torch.arange(count)[:, None]
    labels = torch.zeros(count, dtype=torch.int64)
    evaluator.update([Detections(boxes, torch.full((count,), 0.5), labels)], [Target(boxes, labels)], [meta_of(1)])
    coco = evaluator.compute().coco
    assert coco["AR_300"] == pytest.approx(1)
    assert coco["AR_10"] == pytest.approx(10 / count)
    assert "AR_100" not in coco


def test_the_figures_as_a_flat_dict_and_as_a_table() -> None:
    scores = one_image(Target(BOX, CAT), Detections(BOX, torch.tensor([0.9]), CAT))
    figures = scores.as_dict()
    assert all(type(value) in (float, int) for value in figures.values())
    assert (figures["mAP50"], figures["AP/cat"], figures["images"]) == (pytest.approx(1), pytest.approx(1), 1)
    assert json.loads(json.dumps(figures)).keys() == figures.keys()
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(scores.table())
    text = console.export_text()
    assert "cat" in text
    assert "100.0" in text
    assert "AR_100" in text


def test_the_result_file_scores_as_the_evaluator(tmp_path: Path) -> None:
    case = random_case(8)
    detections, targets, metas, classes = case
    path = tmp_path / "made" / "results.json"
    write_json(
        path, [record for found, meta in zip(detections, metas) for record in coco_results(found, meta, classes)]
    )
    records = json.loads(path.read_text())
    assert set(records[0]) == {"image_id", "category_id", "bbox", "score"}
    assert_equal_figures(evaluate(case), reference(annotations_of(targets, metas, classes), records), classes)


def test_result_records_carry_raw_ids_and_pixels() -> None:
    classes = ClassList(("cat", "dog"), (17, 18))
    found = Detections(torch.tensor([[1.5, 2, 4, 8]]), torch.tensor([0.25]), torch.tensor([1]))
    assert coco_results(found, meta_of("a"), classes) == [
        {"image_id": "a", "category_id": 18, "bbox": [1.5, 2.0, 2.5, 6.0], "score": 0.25}
    ]
    with pytest.raises(ValueError, match=r"a\.jpg have labels 1 to 1, but there are 1 classes"):
        coco_results(found, meta_of("a"), ClassList.from_names(["cat"]))


def crowd_of(count: int, classes: int = 1) -> Target:
    """Objects that do not touch one another, of classes in turn."""
    corners = torch.stack([torch.arange(count) % 20 * 20, torch.arange(count) // 20 * 20], 1).float()
    return Target(torch.cat([corners, corners + 16], 1), torch.arange(count) % classes)


def found_all(target: Target, max_detections: int, max_kept: int | None = None) -> DetectionScores:
    classes = ClassList.from_names(["cat", "dog", "cow"])
    evaluator = DetectionEvaluator(classes, max_detections=max_detections, max_kept=max_kept)
    scores = torch.linspace(1, 0.5, len(target))
    evaluator.update([Detections(target.boxes, scores, target.labels)], [target], [meta_of(1)])
    return evaluator.compute()


def test_more_objects_than_count_are_reported_and_count_on_request() -> None:
    usual = found_all(crowd_of(300), 100)
    assert usual.coco["mAP"] == pytest.approx(0.337, abs=1e-3)
    assert "1 image with more objects than can be found, and 200 detections not counted" in usual.summary
    assert "the best 100 of each class in an image. train.max_dets raises" in usual.summary
    raised = found_all(crowd_of(300), 300)
    assert raised.coco["mAP"] == raised.coco["AR_300"] == pytest.approx(1)
    assert raised.limits == ""
    assert raised.summary.endswith("300 detections.")


@pytest.mark.parametrize(
    ("target", "limits"),
    [
        (crowd_of(100), ""),
        (crowd_of(101), "1 image with more objects than can be found, and 1 detection not counted"),
        (crowd_of(300, classes=3), ""),
        (crowd_of(301, classes=3), "1 image with more objects than can be found, and 1 detection not counted"),
    ],
)
def test_the_limit_is_one_of_each_class(target: Target, limits: str) -> None:
    assert found_all(target, 100).limits[: len(limits) or None] == limits


def test_the_limit_of_the_head_is_reported_too() -> None:
    assert found_all(crowd_of(150, classes=3), 100, max_kept=150).limits == ""
    assert "of each class in an image, of 149 that the head gives" in found_all(crowd_of(150, 3), 100, 149).limits


def test_what_does_not_count_needs_no_detection() -> None:
    target = crowd_of(101)
    one = torch.arange(101) == 0
    for ignored in ({"crowd": one}, {"difficult": one}):
        evaluator = DetectionEvaluator(ClassList.from_names(["cat"]))
        objects = Target(target.boxes, target.labels, **ignored)
        evaluator.update([Detections.empty()], [objects], [meta_of(1)])
        assert evaluator.compute().limits == ""
