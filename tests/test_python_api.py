"""The Python interface as people use it: pickled, copied, in threads and spawned workers, under other defaults."""

import copy
import multiprocessing
import pickle
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from detkit.boxes import soft_nms, weighted_box_fusion
from detkit.errors import ConfigError, DataError
from detkit.inference.predictor import Predictor
from detkit.model import build_model
from detkit.structures import ClassList, Detections

CLASSES = ClassList.from_names(["1", "RBC", "WBC"])
HEADS = {
    "ssd": [],
    "retinanet": ["--backbone", "{name: resnet18, weights: null}", "--neck", "{name: fpn}", "--head",
                  "{name: retinanet}"],
    "yolox": ["--backbone", "{name: csp_darknet, width: 0.125, depth: 0.33}", "--neck", "{name: pafpn, depth: 0.33}",
              "--head", "{name: yolox}"],
    "faster_rcnn": ["--backbone", "{name: resnet18, weights: null}", "--neck", "{name: fpn}", "--head",
                    "{name: faster_rcnn}"],
    "fcn": ["--backbone", "{name: resnet18, weights: null}", "--head", "{name: fcn}"],
    "classify": ["--head", "{name: classify}"],
}  # fmt: skip


def image(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (50, 70, 3), dtype=np.uint8)


def make(tiny: Any, head: str = "ssd") -> Predictor:
    torch.manual_seed(0)
    return Predictor(build_model(tiny(*HEADS[head]), CLASSES), "cpu")


def values(prediction: Any) -> list[torch.Tensor]:
    return [value for value in vars(prediction).values() if isinstance(value, torch.Tensor)]


def same(one: Any, other: Any) -> bool:
    pairs = list(zip(values(one), values(other), strict=True))
    return bool(pairs) and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def predicted(predictor: Predictor, seed: int = 0) -> Any:
    options = {"conf": 0.0, "max_det": 20} if predictor.task.noun == "detections" else {}
    return predictor.predict(image(seed), **options)


@contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


SURROUNDINGS = {
    "float64": default_dtype,
    "default device": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "gradients": torch.enable_grad,
}


@pytest.mark.parametrize("head", HEADS)
def test_it_can_be_pickled_and_copied(tiny: Any, head: str) -> None:
    predictor = make(tiny, head)
    expected = predicted(predictor)
    for other in (pickle.loads(pickle.dumps(predictor)), copy.deepcopy(predictor)):
        assert same(predicted(other), expected)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_results_do_not_depend_on_the_defaults_of_torch(tiny: Any, head: str, name: str) -> None:
    predictor = make(tiny, head)
    expected = predicted(predictor)
    with SURROUNDINGS[name]():
        assert same(predicted(predictor), expected)
    with SURROUNDINGS[name]():  # nothing of it was kept
        pass
    assert same(predicted(predictor, 0), expected)


@pytest.mark.parametrize("name", ["float64", "default device", "autocast"])
def test_boxes_do_not_depend_on_the_defaults_of_torch(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(50, 2, generator=generator) * 50
    boxes, scores = torch.cat((corners, corners + 20), 1), torch.rand(50, generator=generator)
    labels = torch.randint(0, 3, (50,), generator=generator)

    of_source = torch.arange(50) // 25

    def compute() -> list[torch.Tensor]:
        fused = weighted_box_fusion(boxes, scores, labels=labels, source_index=of_source, source_weights=(1, 1))
        found = (*soft_nms(boxes, scores, labels=labels), *fused)
        return [value for value in found if isinstance(value, torch.Tensor)]

    expected = compute()
    with SURROUNDINGS[name]():
        found = compute()
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def in_worker(job: tuple[Predictor, int]) -> Detections:
    predictor, seed = job
    return predictor.predict(image(seed), conf=0.0, max_det=20)


def test_spawned_workers_predict_the_same(tiny: Any) -> None:
    predictor = make(tiny)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = list(pool.map(in_worker, [(predictor, seed) for seed in range(2)]))
    assert all(same(each, predicted(predictor, seed)) for seed, each in enumerate(found))


@pytest.mark.parametrize("head", HEADS)
def test_threads_share_a_predictor(tiny: Any, head: str) -> None:
    predictor = make(tiny, head)
    expected = [predicted(predictor, seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda job: predicted(predictor, job % 4), range(16)))
    assert all(same(each, expected[job % 4]) for job, each in enumerate(found))


def test_one_image_of_every_kind(tiny: Any) -> None:
    predictor = make(tiny)
    pixels = image()
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    expected = predicted(predictor)
    for given in (Image.fromarray(pixels), tensor, tensor / 255, tensor.double() / 255, tensor.half() / 255):
        assert same(predictor.predict(given, conf=0.0, max_det=20), expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(1, 3, 8, 8), "one image"),
        (torch.zeros(8, 8, 3), "one image"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), "uint8, or float"),
        (torch.full((3, 8, 8), 255.0), r"0\.\.1"),
        (torch.full((3, 8, 8), -1.0), r"0\.\.1"),
        (torch.full((3, 8, 8), float("nan")), r"0\.\.1"),
        (None, "of type NoneType"),
        (3, "of type int"),
        ([image()], "of type list"),
        (np.zeros((8, 8, 3)), "uint8"),
    ],
)
def test_other_values_are_refused_in_one_sentence(tiny: Any, given: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        make(tiny).predict(given)


def test_several_images_may_come_from_a_generator(tiny: Any) -> None:
    predictor, taken = make(tiny), []

    def images() -> Iterator[np.ndarray]:
        for seed in range(5):
            taken.append(seed)
            yield image(seed)

    results = predictor.predict_all(images(), conf=0.0, max_det=20, batch_size=2)
    first = next(results)
    assert taken == [0, 1]
    for seed, found in enumerate([first, *results]):  # in batches, in which sums may be rounded otherwise
        torch.testing.assert_close(found.scores, predicted(predictor, seed).scores, rtol=0, atol=1e-5)
    assert list(predictor.predict_all(iter([]))) == []
    batch = torch.from_numpy(np.stack([image(seed) for seed in range(3)])).permute(0, 3, 1, 2)
    found = list(predictor.predict_all(batch, conf=0.0, max_det=20, batch_size=1))
    assert all(same(each, predicted(predictor, seed)) for seed, each in enumerate(found))
    for one in ("a.jpg", image()):
        with pytest.raises(ConfigError, match="Use `predict` for one"):
            predictor.predict_all(one)  # type: ignore[arg-type]
    for size in (0, -1, 1.5, True, "2"):
        with pytest.raises(ConfigError, match="'batch' must be an integer"):
            predictor.predict_all([image()], batch_size=size)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("classes", "labels"),
    [
        (1, {1}), ([1, "RBC"], {1}), ("RBC", {1}), ("1", {0}), (["1", 2], {0, 2}), ("2", {2}), (np.int64(2), {2}),
        (("WBC",), {2}), ({"RBC", "WBC"}, {1, 2}), (torch.tensor([0, 2]).tolist(), {0, 2}),
    ],
)  # fmt: skip
def test_classes_mean_what_they_say(tiny: Any, classes: Any, labels: set[int]) -> None:
    found = make(tiny).predict(image(), conf=0.0, max_det=300, classes=classes)
    assert set(found.labels.tolist()) == labels


@pytest.mark.parametrize(
    "options",
    [
        {"classes": "12"}, {"classes": 3}, {"classes": -1}, {"classes": 1.0}, {"classes": []}, {"classes": [None]},
        {"conf": "0.5"}, {"conf": [0.5]}, {"conf": 1.5}, {"iou": None, "conf": float("nan")}, {"max_det": 2.0},
        {"max_det": 0}, {"iou": True}, {"gallery": "nowhere"},
    ],
)  # fmt: skip
def test_wrong_options_get_one_sentence(tiny: Any, options: dict[str, Any]) -> None:
    with pytest.raises((ConfigError, DataError)) as raised:
        make(tiny).predict(image(), **options)
    assert len(str(raised.value)) < 300


def test_detections_are_chosen_as_from_a_list() -> None:
    boxes = torch.arange(16.0).reshape(4, 4)
    found = Detections(boxes, torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.arange(4), class_names=("a", "b", "c", "d"))
    rows = list(found)
    for index in (0, 3, -1, -4, np.int64(2), torch.tensor(1)):
        assert found[index] == rows[int(index)]
    assert [found[index] for index in range(len(found))] == rows
    for index in (slice(1, 3), slice(None, None, 2), slice(0, 0), slice(-2, None)):
        assert list(found[index]) == rows[index]
    for mask in ([True, False, True, False], np.array([1, 0, 1, 0], bool), torch.tensor([True, False, True, False])):
        assert list(found[mask]) == [rows[0], rows[2]]
    for indices in ([3, 0], (3, 0), np.array([3, 0]), torch.tensor([3, 0])):
        assert list(found[indices]) == [rows[3], rows[0]]
    assert len(found[[]]) == len(found[found.scores > 2]) == 0
    for index in (4, -5, [True], [7]):
        with pytest.raises(IndexError):
            found[index]
    for index in ("a", 1.5, None, [0.5], torch.zeros(2, 2, dtype=torch.int64)):
        with pytest.raises(TypeError):
            found[index]  # type: ignore[call-overload]
