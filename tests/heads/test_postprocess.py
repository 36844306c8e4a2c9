"""Which scores become detections: against plain loops over all of them, on many seeds."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import batched_nms
from zoo_cases import zoo_cases

from detkit.boxes.coding import decode
from detkit.boxes.convert import clip
from detkit.errors import DetkitError
from detkit.heads.base import Postprocess
from detkit.heads.retinanet import DEVIATIONS, PARTS, RetinaNet, RetinaNetOutputs, _above
from detkit.heads.ssd import SSD, SSDOutputs
from detkit.heads.yolox import YOLOX, YOLOXOutputs
from detkit.structures import Detections

SIZE = (64, 96)


def plain_candidates(scores: Tensor, threshold: float, most: int) -> list[tuple[float, int, int]]:
    """(score, row, label), class by class, the best first, of equal scores the first row."""
    found = []
    for label in range(scores.shape[1]):
        column = [(score, row, label) for row, score in enumerate(scores[:, label].tolist()) if score > threshold]
        found += sorted(column, key=lambda entry: (-entry[0], entry[1]))[:most]
    return found


def listed(found: tuple[Tensor, Tensor, Tensor]) -> list[tuple[float, int, int]]:
    rows, labels, scores = found
    return list(zip(scores.tolist(), rows.tolist(), labels.tolist()))


@pytest.mark.parametrize("seed", range(30))
def test_candidates_are_those_of_a_plain_loop(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, classes, most = (int(torch.randint(1, high, (1,), generator=generator)) for high in (60, 6, 40))
    scores = torch.rand(rows, classes, generator=generator) ** (1 + 5 * (seed % 2))
    # Classes of many candidates beside some of few.
    scores[:, : classes // 2] *= 0.5
    threshold = 0.4 if seed % 5 else 0.0
    found = listed(Postprocess(threshold, 0.5, most).candidates(scores))
    expected = plain_candidates(scores.double(), float(torch.tensor(threshold)), most)
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("seed", range(20))
def test_of_equal_scores_as_many_are_taken_as_there_is_room_for(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 5, (50, 4), generator=generator) / 4
    found = Postprocess(0.25, 0.5, 12).candidates(scores)
    assert len(set(listed(found))) == len(found[0])
    assert torch.equal(scores[found[0], found[1]], found[2])
    expected = plain_candidates(scores, 0.25, 12)
    assert sorted((label, score) for score, _, label in listed(found)) == sorted((e[2], e[0]) for e in expected)
    # Where none is left out, they come in order: of equal scores suppression keeps the first.
    everything = listed(Postprocess(0.25, 0.5, 50).candidates(scores))
    assert [list(entry[1:]) for entry in everything] == (scores > 0.25).nonzero().tolist()


def test_a_score_equal_to_the_threshold_is_no_candidate() -> None:
    scores = torch.tensor([[0.3, 0.30000004], [0.3, 0.1]])
    assert listed(Postprocess(0.3).candidates(scores)) == [(pytest.approx(0.3), 0, 1)]


@pytest.mark.parametrize("shape", [(0, 3), (4, 3)])
def test_there_may_be_no_candidates(shape: tuple[int, int]) -> None:
    for tensor in Postprocess(0.5).candidates(torch.zeros(shape)):
        assert tensor.shape == (0,)


@pytest.mark.parametrize("most", [1, 400])
def test_a_score_that_is_no_number_is_an_error(most: int) -> None:
    scores = torch.zeros(30, 3)
    scores[17, 1] = math.nan
    with pytest.raises(DetkitError, match="scores are NaN"):
        Postprocess(0.5, 0.5, most).candidates(scores)


@pytest.mark.parametrize("threshold", [0.0, 1e-7, 0.01, 0.3, 0.5, 0.9999, 1.0])
def test_rows_above_the_threshold_are_all_found_with_few_below(threshold: float) -> None:
    limits = torch.logit(torch.tensor(threshold, dtype=torch.float64)).clamp(-100, 100)
    near = torch.cat((torch.linspace(-110, 110, 2001), (limits + torch.linspace(-1e-3, 1e-3, 20001)).float()))
    postprocess = Postprocess(threshold)
    found = set(postprocess.above_threshold(near).tolist())
    above = set((near.sigmoid() > threshold).nonzero().flatten().tolist())
    assert above <= found
    kept = near[sorted(found)].double().sigmoid()
    assert bool((kept > threshold * (1 - 2e-4)).all())


def test_rows_above_the_threshold_include_those_whose_scores_may_be_nan() -> None:
    limits = torch.tensor([-50.0, math.nan, math.inf, -math.inf, 50.0])
    assert Postprocess(0.5).above_threshold(limits).tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("seed", range(20))
def test_above_finds_what_a_plain_comparison_finds(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(1, 40 * PARTS, (1,), generator=generator))
    values = torch.randn(count, generator=generator)
    values[torch.randint(count, (1,), generator=generator)] = math.nan
    for bound in (-10.0, 0.0, 2.5, 10.0, -math.inf):
        expected = [place for place, value in enumerate(values.tolist()) if not value <= bound]
        assert _above(values, bound).tolist() == expected
    assert _above(values[:0], 0.0).tolist() == []


def ssd(regime: float, generator: torch.Generator) -> tuple[SSD, Any, Callable[[Any, int], tuple[Tensor, Tensor]]]:
    head = SSD([4, 4], [8, 16], 5)
    anchors = head.layout([(8, 12), (4, 6)], SIZE, head.strides)
    logits = 2 * torch.randn(2, len(anchors), 6, generator=generator)
    logits[..., 0] += regime
    outputs = SSDOutputs(logits, torch.randn(2, len(anchors), 4, generator=generator), anchors, (SIZE, (60, 80)))
    return head, outputs, lambda o, image: (o.logits[image].softmax(1)[:, 1:], decode(o.offsets[image], o.anchors))


def retinanet(regime: float, generator: torch.Generator) -> tuple[RetinaNet, Any, Callable[..., Any]]:
    head = RetinaNet([8, 8], [8, 16], 5, depth=0, candidates=10**6)
    anchors = head.layout([(8, 12), (4, 6)], SIZE, head.strides)
    logits = 2 * torch.randn(2, len(anchors), 5, generator=generator) - regime
    offsets = torch.randn(2, len(anchors), 4, generator=generator)
    outputs = RetinaNetOutputs(logits, offsets, anchors, (9 * 96, 9 * 24), (SIZE, (60, 80)))
    return head, outputs, lambda o, i: (o.logits[i].sigmoid(), decode(o.offsets[i], o.anchors, deviations=DEVIATIONS))


def yolox(regime: float, generator: torch.Generator) -> tuple[YOLOX, Any, Callable[..., Any]]:
    head = YOLOX([4, 4], [8, 16], 5)
    corners, strides = head.cells(torch.device("cpu"), ((8, 12), (4, 6)), head.strides)
    classes, objects = (
        2 * torch.randn(2, len(corners), 5, generator=generator),
        2 * torch.randn(2, len(corners), generator=generator) - regime,
    )
    offsets = torch.randn(2, len(corners), 4, generator=generator)
    outputs = YOLOXOutputs(classes, objects, offsets, corners, strides, (SIZE, (60, 80)))

    def plain(o: YOLOXOutputs, image: int) -> tuple[Tensor, Tensor]:
        scores = o.class_logits[image].sigmoid() * o.objectness[image, :, None].sigmoid()
        return scores.where(scores == scores.amax(1, keepdim=True), 0.0), o.boxes()[image]

    return head, outputs, plain


CASES = {
    "ssd": (ssd, "logits"),
    "retinanet": (retinanet, "logits"),
    "yolox": (yolox, "class_logits"),
    **zoo_cases("POSTPROCESSED"),
}


def expected_of(scores: Tensor, boxes: Tensor, size: tuple[int, int], limits: Postprocess) -> Detections:
    """Of the scores and boxes of all anchors; suppression by torchvision."""
    chosen = plain_candidates(scores.double(), limits.score_threshold, limits.max_candidates)
    rows, labels = (torch.tensor([entry[part] for entry in chosen], dtype=torch.int64) for part in (1, 2))
    boxes, best = clip(boxes[rows], size), scores[rows, labels]
    kept = batched_nms(boxes, best, labels, limits.iou_threshold)[: limits.max_detections]
    return Detections(boxes[kept], best[kept], labels[kept])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("regime", [0.0, 4.0, 40.0])
def test_detections_are_those_of_all_scores_and_boxes(name: str, seed: int, regime: float) -> None:
    """Whether most anchors have a candidate, some, or none."""
    head, outputs, plain = CASES[name][0](regime, torch.Generator().manual_seed(seed))
    for threshold, most in ((0.05, 20), (0.3, 400), (0.0, 10)):
        head.postprocess = replace(head.postprocess, score_threshold=threshold, max_detections=most)
        for image, found in enumerate(head.decode(outputs)):
            expected = expected_of(*plain(outputs, image), outputs.sizes[image], head.postprocess)
            torch.testing.assert_close(found.scores, expected.scores, rtol=1e-6, atol=0)
            same = (found.labels[:, None] == expected.labels) & torch.isclose(found.scores[:, None], expected.scores)
            same &= ((found.boxes[:, None] - expected.boxes).abs() < 1e-3).all(-1)
            assert bool(same.any(0).all())
            assert bool(same.any(1).all())
    assert len(found) == (0 if regime == 40 and threshold else 10)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("place", [0, 7, -1])
def test_a_broken_number_is_found_though_nothing_else_is(name: str, place: int) -> None:
    build, logits = CASES[name]
    head, outputs, _ = build(40.0, torch.Generator().manual_seed(0))
    getattr(outputs, logits)[1, place, -1] = math.nan
    with pytest.raises(DetkitError, match="scores are NaN"):
        head.decode(outputs)


def test_a_background_without_bounds_is_an_error_of_softmax() -> None:
    head, outputs, _ = ssd(4.0, torch.Generator().manual_seed(0))
    outputs.logits[0, 3, 0] = math.inf
    with pytest.raises(DetkitError, match="scores are NaN"):
        head.decode(outputs)
