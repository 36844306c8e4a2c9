"""SimOTA against the paper's rule in plain loops."""

import math

import pytest
import torch
from torch import Tensor

from detkit.boxes.sim_ota import match_sim_ota

STRIDES = (8, 16, 32)


def cells(height: int, width: int) -> tuple[Tensor, Tensor]:
    points, sides = [], []
    for stride in STRIDES:
        for row in range(math.ceil(height / stride)):
            for column in range(math.ceil(width / stride)):
                points.append([(column + 0.5) * stride, (row + 0.5) * stride])
                sides.append(float(stride))
    return torch.tensor(points, dtype=torch.float64), torch.tensor(sides, dtype=torch.float64)


def problem(seed: int, targets: int, classes: int = 3, size: tuple[int, int] = (96, 128)) -> dict[str, Tensor]:
    """Predictions of which many are near the ground truths, in double precision so that no two costs tie."""
    random = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=random, dtype=torch.float64)

    points, strides = cells(*size)
    corner = uniform(targets, 2) * torch.tensor([110.0, 80.0])
    boxes = torch.cat((corner, corner + 2 + 50 * uniform(targets, 2) ** 2), 1)
    count = len(points)
    sides = strides[:, None] * 4 * uniform(count, 2)
    centres = points + (uniform(count, 2) - 0.5) * strides[:, None]
    predicted = torch.cat((centres - sides / 2, centres + sides / 2), 1)
    if targets:
        copied = torch.randint(0, targets, (count,), generator=random)
        near = boxes[copied] + (uniform(count, 4) - 0.5) * 12
        predicted = torch.where(uniform(count, 1) < 0.3, near, predicted)
    return {
        "points": points,
        "strides": strides,
        "boxes": predicted,
        "class_logits": 6 * uniform(count, classes) - 3,
        "objectness": 6 * uniform(count) - 3,
        "targets": boxes,
        "labels": torch.randint(0, classes, (targets,), generator=random),
        "ignored_targets": uniform(targets) < 0.2,
    }


def loop_iou(a: list[float], b: list[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height)


def strictly_inside(point: list[float], box: list[float]) -> bool:
    return box[0] < point[0] < box[2] and box[1] < point[1] < box[3]


def in_square(point: list[float], box: list[float], reach: float) -> bool:
    return abs(point[0] - (box[0] + box[2]) / 2) < reach and abs(point[1] - (box[1] + box[3]) / 2) < reach


def loop_cost(problem: dict, cell: int, target: int, radius: float) -> float:
    cost = 0.0
    objectness = 1 / (1 + math.exp(-problem["objectness"][cell]))
    for label, logit in enumerate(problem["class_logits"][cell]):
        score = math.sqrt(objectness / (1 + math.exp(-logit)))
        cost -= math.log(score if label == problem["labels"][target] else 1 - score)
    point, box = problem["points"][cell], problem["targets"][target]
    cost -= 3 * math.log(loop_iou(box, problem["boxes"][cell]) + 1e-8)
    both = strictly_inside(point, box) and in_square(point, box, radius * problem["strides"][cell])
    return cost + 1e5 * (not both)


def loop_match(tensors: dict[str, Tensor], radius: float, candidates: int) -> tuple[dict[int, int], set[int]]:
    """The ground truth of each positive cell, and the ignored cells."""
    values = {name: tensor.tolist() for name, tensor in tensors.items()}
    targets = [index for index, ignored in enumerate(values["ignored_targets"]) if not ignored]
    near = []
    for cell, point in enumerate(values["points"]):
        boxes = [values["targets"][target] for target in targets]
        reach = radius * values["strides"][cell]
        if any(strictly_inside(point, box) or in_square(point, box, reach) for box in boxes):
            near.append(cell)
    takers: dict[int, list[int]] = {}
    costs = {(cell, target): loop_cost(values, cell, target, radius) for cell in near for target in targets}
    for target in targets if near else ():
        ious = sorted((loop_iou(values["targets"][target], values["boxes"][cell]) for cell in near), reverse=True)
        amount = max(1, int(sum(ious[:candidates])))
        for cell in sorted(near, key=lambda cell: costs[cell, target])[:amount]:
            takers.setdefault(cell, []).append(target)
    owners = {
        cell: taken_by[0] if len(taken_by) == 1 else min(targets, key=lambda target: costs[cell, target])
        for cell, taken_by in takers.items()
    }
    ignored = {
        cell
        for cell, point in enumerate(values["points"])
        for target, flag in enumerate(values["ignored_targets"])
        if flag and cell not in owners and strictly_inside(point, values["targets"][target])
    }
    return owners, ignored


@pytest.mark.parametrize(("targets", "radius", "candidates"), [(1, 2.5, 10), (4, 2.5, 10), (12, 1.5, 10), (9, 2.5, 3)])
def test_equals_the_loops(targets: int, radius: float, candidates: int) -> None:
    several = positives = ignored_cells = 0
    for seed in range(20):
        tensors = problem(seed, targets)
        match = match_sim_ota(**tensors, centre_radius=radius, candidates=candidates)
        owners, ignored = loop_match(tensors, radius, candidates)
        found = match.positive.nonzero().flatten().tolist()
        assert dict(zip(found, match.target_index[match.positive].tolist())) == owners
        assert set(match.ignored.nonzero().flatten().tolist()) == ignored
        positives += len(found)
        ignored_cells += len(ignored)
        several += len(found) > len(set(owners.values()))
    assert positives > 20 * targets * 0.7
    assert ignored_cells > 0
    assert several > 10


def test_of_a_cell_that_two_targets_take_the_cheaper_has_it() -> None:
    points, strides = torch.tensor([[16.0, 16.0]]), torch.tensor([32.0])
    targets = torch.tensor([[0.0, 0, 20, 20], [2, 2, 30, 30], [1, 1, 25, 25]])
    match = match_sim_ota(
        points, strides, targets[1:2], torch.zeros(1, 2), torch.zeros(1), targets, torch.tensor([0, 0, 1])
    )
    assert match.positive.tolist() == [True]
    assert match.target_index.tolist() == [1]
    # the class decides where the boxes do not
    same = targets[1:2].repeat(2, 1)
    logits = torch.tensor([[-3.0, 3.0]])
    match = match_sim_ota(points, strides, same[:1], logits, torch.zeros(1), same, torch.tensor([0, 1]))
    assert match.target_index.tolist() == [1]


def test_k_is_the_sum_of_the_overlaps_rounded_down() -> None:
    points = torch.stack((torch.arange(20.0) * 2 + 1, torch.full((20,), 20.0)), 1)
    target = torch.tensor([[0.0, 0, 40, 40]])
    arguments = (torch.zeros(20, 1), torch.zeros(20), target, torch.zeros(1, dtype=torch.int64))
    for overlaps, count in (([0.9, 0.8, 0.7], 2), ([0.9], 1), ([], 1), ([0.99] * 14, 9)):
        boxes = torch.zeros(20, 4)
        boxes[: len(overlaps)] = torch.tensor([[0.0, 0, 40, 40 * overlap] for overlap in overlaps]).reshape(-1, 4)
        match = match_sim_ota(points, torch.full((20,), 16.0), boxes, *arguments)
        assert match.positive.sum() == count


def test_nothing_to_match() -> None:
    tensors = problem(0, 0)
    match = match_sim_ota(**tensors)
    assert match.negative.all()
    tensors = problem(0, 3)
    assert len(match_sim_ota(**{**tensors, **{name: tensors[name][:0] for name in list(tensors)[:5]}}).positive) == 0
    # only a crowd: nothing positive, what lies in it is ignored, and without the flag it would not be
    crowd = {**problem(0, 1), "targets": torch.tensor([[10.0, 10, 60, 50]], dtype=torch.float64)}
    match = match_sim_ota(**{**crowd, "ignored_targets": torch.tensor([True])})
    assert not match.positive.any()
    inside = (crowd["points"] > torch.tensor([10, 10])).all(1) & (crowd["points"] < torch.tensor([60, 50])).all(1)
    assert torch.equal(match.ignored, inside)
    assert match_sim_ota(**{**crowd, "ignored_targets": torch.tensor([False])}).positive.any()


def test_targets_without_area_far_away_or_tiny_get_a_cell_where_they_are() -> None:
    """Also where every prediction is worthless."""
    tensors = problem(1, 3)
    targets = torch.tensor([[50.0, 50, 50, 50], [70, 20, 71, 21], [-200, -200, -190, -190]], dtype=torch.float64)
    tensors |= {"targets": targets, "ignored_targets": torch.zeros(3, dtype=torch.bool)}
    tensors["boxes"] = torch.full_like(tensors["boxes"], 1000.0)
    match = match_sim_ota(**tensors)
    owners = match.target_index[match.positive]
    assert {0, 1} <= set(owners.tolist())
    for target in (0, 1):
        cell = tensors["points"][match.positive][owners == target]
        assert (cell - targets[target, :2]).abs().max() < 2.5 * 32


def test_extreme_logits_keep_the_costs_finite() -> None:
    tensors = problem(2, 4)
    for extreme in (-1e4, 1e4):
        match = match_sim_ota(**{**tensors, "class_logits": torch.full_like(tensors["class_logits"], extreme)})
        assert match.positive.sum() >= 1
    far = match_sim_ota(**{**tensors, "objectness": torch.full_like(tensors["objectness"], 1e4)})
    assert far.positive.sum() >= 1


def test_a_prediction_that_is_nan_is_one_that_overlaps_nothing() -> None:
    tensors = problem(2, 4)
    for broken in (torch.arange(len(tensors["points"])) % 3 == 0, ~match_sim_ota(**tensors).positive):
        boxes = {value: tensors["boxes"].masked_fill(broken[:, None], value) for value in (math.nan, -1e6)}
        match, expected = (match_sim_ota(**{**tensors, "boxes": boxes[value]}) for value in boxes)
        assert torch.equal(match.positive, expected.positive)
        assert torch.equal(match.target_index, expected.target_index)
        assert (match.positive & ~broken).any()


def test_single_precision_tells_cells_outside_apart() -> None:
    """A target smaller than a cell has no cell inside both; of those around it the cheapest must win all the same."""
    points, strides = cells(96, 128)
    random = torch.Generator().manual_seed(0)
    logits = torch.zeros(len(points), 1)
    chosen = int(((points - torch.tensor([49.0, 49.0])).abs().sum(1) < 14).nonzero()[0])
    logits[chosen] += 1e-3
    target = torch.tensor([[48.5, 48.5, 49.5, 49.5]])
    boxes = torch.rand(len(points), 4, generator=random) * 0
    match = match_sim_ota(
        points.float(), strides.float(), boxes, logits, torch.zeros(len(points)), target, torch.tensor([0])
    )
    assert match.positive.nonzero().flatten().tolist() == [chosen]
