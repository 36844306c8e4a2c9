"""MTCNN: its boxes by hand, its windows, and the published weights against facenet-pytorch's own result."""

import importlib.util
import itertools
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import detkit
from detkit.errors import CheckpointError, ConfigError
from detkit.registry import heads
from detkit.structures import Target
from detkit.zoo.faces import mtcnn_boxes as geometry
from detkit.zoo.faces.converter import NETWORKS, convert_mtcnn
from detkit.zoo.faces.mtcnn import MTCNN, MTCNNOutputs
from detkit.zoo.faces.mtcnn_windows import NEGATIVE_BELOW, PART_FROM, POSITIVE_FROM, draw_windows

# What facenet-pytorch 2.6.0, MTCNN(keep_all=True).detect, says of skimage.data.astronaut().
ASTRONAUT_BOX = [181.0514, 62.1561, 267.7473, 172.0502]
ASTRONAUT_SCORE = 0.9999977
ASTRONAUT_POINTS = [
    [205.0109, 101.7274], [246.7626, 103.7141], [224.6714, 128.9650], [201.7161, 139.2462], [245.2655, 141.8570],
]  # fmt: skip


def weights() -> str:
    """The folder with the published weights, or a skipped test."""
    given = os.environ.get("MTCNN_WEIGHTS")
    if given:
        return given
    package = importlib.util.find_spec("facenet_pytorch")
    if package is None or package.origin is None:
        pytest.skip("needs facenet-pytorch (pip install --no-deps), or its folder data in MTCNN_WEIGHTS")
    return str(Path(package.origin).parent / "data")


def build(**options: object) -> MTCNN:
    torch.manual_seed(0)
    head: MTCNN = heads.build({"name": "mtcnn", **options}, "head", channels=(3,), strides=(1,), num_classes=1)
    return head


def targets(*boxes: list[float], ignored: bool = False) -> Target:
    box = torch.tensor(boxes).reshape(-1, 4)
    points = box[:, None, :2] + torch.linspace(0.2, 0.8, 5)[:, None] * (box[:, 2:] - box[:, :2])[:, None]
    labels, flags = torch.zeros(len(box), dtype=torch.int64), torch.full((len(box),), ignored)
    return Target(box, labels, difficult=flags, points=points, visible=torch.ones(len(box), 5, dtype=torch.bool))


def test_the_published_weights_find_the_astronaut() -> None:
    data = pytest.importorskip("skimage.data")
    found = detkit.load(f"mtcnn:{weights()}", "cpu").predict(data.astronaut())
    assert len(found) == 1
    np.testing.assert_allclose(found.boxes[0], ASTRONAUT_BOX, atol=0.01)
    np.testing.assert_allclose(found.points[0], ASTRONAUT_POINTS, atol=0.01)  # type: ignore[index]
    assert float(found.scores[0]) == pytest.approx(ASTRONAUT_SCORE, abs=1e-6)


def test_the_published_weights_say_what_facenet_pytorch_says() -> None:
    data = pytest.importorskip("skimage.data")
    reference = pytest.importorskip("facenet_pytorch").MTCNN(keep_all=True)
    predictor = detkit.load("mtcnn:", "cpu")
    image = data.astronaut()
    for picture in (image, image[:300], image[40:200, 150:310], np.tile(image, (2, 2, 1))[:700, :900], image[::2, ::2]):
        boxes, scores, points = reference.detect(np.ascontiguousarray(picture), landmarks=True)
        order = np.argsort(-scores.astype(float))
        found = predictor.predict(np.ascontiguousarray(picture))
        np.testing.assert_allclose(found.boxes, boxes[order].astype(float), atol=0.01)
        np.testing.assert_allclose(found.points, points[order].astype(float), atol=0.01)  # type: ignore[arg-type]
        np.testing.assert_allclose(found.scores, scores[order].astype(float), atol=1e-5)


def test_names_of_the_published_tensors_are_all_ours() -> None:
    """State dicts under facenet-pytorch's names, made from our own."""
    head = build()
    names = {
        "pnet": {"face": "conv4_1", "box": "conv4_2"},
        "rnet": {"face": "dense5_1", "box": "dense5_2"},
        "onet": {"face": "dense6_1", "box": "dense6_2", "points": "dense6_3"},
    }
    states = {}
    for network in NETWORKS:
        state = getattr(head, network).state_dict()
        states[network] = {
            name.removeprefix("trunk.") if name.startswith("trunk.") else
            ".".join([names[network][name.split(".")[0]], name.split(".")[1]]): tensor
            for name, tensor in state.items()
        }  # fmt: skip
    tensors, experiment, classes = convert_mtcnn(states)
    assert {name.removeprefix("head.") for name in tensors} == set(head.state_dict())
    assert all(torch.equal(tensors[f"head.{name}"], tensor) for name, tensor in head.state_dict().items())
    assert experiment.head == {"name": "mtcnn"}
    assert classes.names == ("face",)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"There is no '.*pnet.pt'"):
        detkit.load(f"mtcnn:{tmp_path}")


def test_boxes_by_hand() -> None:
    boxes = torch.tensor([[11.0, 21, 20, 40]])  # 10 x 20 pixels
    assert geometry.squares(boxes).tolist() == [[6.0, 21, 25, 40]]
    assert geometry.moved(boxes, torch.tensor([[0.1, 0.1, -0.1, -0.1]])).tolist() == [[12.0, 23, 19, 38]]
    places = torch.rand(1, 10)
    points = geometry.points_in(boxes, places)
    torch.testing.assert_close(geometry.fractions_of(boxes, points), places)
    assert geometry.points_in(boxes, torch.full((1, 10), 0.5))[0, 0].tolist() == [15.0, 30.0]
    target = torch.tensor([[12.5, 20, 23, 39]])
    torch.testing.assert_close(geometry.moved(boxes, geometry.offsets_to(boxes, target)), target)
    assert geometry.cells(torch.tensor([0, 3]), torch.tensor([0, 2]), 0.5).tolist() == [
        [2, 2, 24, 24],
        [10, 14, 32, 36],
    ]


def test_scales_reach_from_the_smallest_object_to_the_image() -> None:
    scales = geometry.pyramid_scales((100, 60), 20, 0.7)
    assert scales[0] == 0.6
    assert all(b == pytest.approx(0.7 * a) for a, b in itertools.pairwise(scales))
    assert 60 * scales[-1] >= 12 > 60 * scales[-1] * 0.7
    assert geometry.pyramid_scales((100, 19), 20, 0.7) == []


@pytest.mark.parametrize("seed", range(10))
def test_suppression_by_the_smaller_box_is_that_of_a_plain_loop(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    corners = 60 * torch.rand(40, 2, generator=generator)
    boxes = torch.cat((corners, corners + 2 + 40 * torch.rand(40, 2, generator=generator)), 1)
    scores = torch.rand(40, generator=generator)
    kept: list[int] = []
    for index in scores.argsort(descending=True).tolist():
        one = boxes[index].tolist()
        for other in (boxes[earlier].tolist() for earlier in kept):
            across = max(0.0, min(one[2], other[2]) - max(one[0], other[0]) + 1)
            down = max(0.0, min(one[3], other[3]) - max(one[1], other[1]) + 1)
            areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (one, other)]
            if across * down / min(areas) > 0.7:
                break
        else:
            kept.append(index)
    assert geometry.suppress_by_smaller(boxes, scores, 0.7).tolist() == kept


def test_windows_are_cut_at_the_border_and_resized_by_areas() -> None:
    image = torch.arange(36.0).view(1, 6, 6)
    whole, corner = geometry.windows(image, torch.tensor([[1.0, 1, 6, 6], [-3, -3, 2.9, 2.9]]), 2)
    assert whole[0].tolist() == [[7.0, 10], [25, 28]]
    assert corner[0].tolist() == [[0.0, 1], [6, 7]]
    inside = geometry.in_image(torch.tensor([[-9.0, 1, 0, 6], [6, 6, 9, 9], [7, 1, 9, 9]]), (6, 6))
    assert inside.tolist() == [False, True, False]


@pytest.mark.parametrize("seed", range(5))
def test_windows_show_what_they_are_drawn_for(seed: int) -> None:
    torch.manual_seed(seed)
    target = targets([10.0, 20, 50, 70], [60, 5, 80, 25])
    windows = draw_windows(target, (90, 100), 300)
    kinds = torch.stack((windows.positive, windows.part, windows.negative))
    assert (kinds.sum(0) == 1).all()
    assert (kinds.sum(1) > 10).all()
    exclusive = windows.boxes - torch.tensor([1.0, 1, 0, 0])
    iou = detkit_iou(exclusive, target.boxes)
    assert (iou.max(1).values[windows.positive] >= POSITIVE_FROM).all()
    assert (iou.max(1).values[windows.part] >= PART_FROM).all()
    assert (iou.max(1).values[windows.part] < POSITIVE_FROM).all()
    assert (iou.max(1).values[windows.negative] < NEGATIVE_BELOW).all()
    assert geometry.in_image(windows.boxes, (90, 100)).all()


def detkit_iou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    import torchvision

    return torchvision.ops.box_iou(a, b)


def test_what_is_ignored_is_never_background() -> None:
    windows = draw_windows(targets([0.0, 0, 50, 90], ignored=True), (90, 100), 500)
    assert not (windows.positive | windows.part).any()
    assert len(windows.boxes) > 50
    shared = (windows.boxes[:, 2].clamp(max=50) - (windows.boxes[:, 0] - 1)).clamp(min=0)
    assert (shared / (windows.boxes[:, 2] - windows.boxes[:, 0] + 1) < NEGATIVE_BELOW).all()


def test_a_network_that_says_the_target_has_no_loss_of_boxes_and_points() -> None:
    head = build(windows=60)
    outputs = MTCNNOutputs(torch.rand(1, 3, 64, 64), ((64, 64),))
    target = targets([10.0, 12, 40, 44])
    torch.manual_seed(3)
    drawn = draw_windows(target, (64, 64), 60)
    show = drawn.positive | drawn.part
    offsets = torch.zeros(len(drawn.boxes), 4)
    offsets[show] = geometry.offsets_to(drawn.boxes[show], target.boxes.expand(int(show.sum()), 4))
    points = geometry.fractions_of(drawn.boxes, target.points.expand(len(drawn.boxes), 5, 2))  # type: ignore[union-attr]
    logits = torch.stack((30.0 * drawn.negative, 30.0 * drawn.positive), 1)
    found = head.onet(torch.zeros(1, 3, 48, 48))._replace(logits=logits, offsets=offsets, points=points)
    losses = head._losses(found, [drawn], (target,))
    assert all(float(value) < 1e-6 for value in losses.values())
    torch.manual_seed(3)
    assert all(value > 0 for value in head.loss(outputs, (target,)).values())


def test_tiny_and_empty_images_have_no_objects() -> None:
    head = build().eval()
    for size in ((5, 7), (19, 200), (64, 64)):
        found = head.decode(MTCNNOutputs(torch.zeros(1, 3, 64, 200), (size,)))[0]
        assert found.boxes.shape[1:] == (4,)
        assert found.points is not None
        assert found.points.shape[1:] == (5, 2)


def test_other_backbones_points_and_options_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"name: pixels"):
        heads.build({"name": "mtcnn"}, "head", channels=(8,), strides=(8,), num_classes=1)
    with pytest.raises(ConfigError, match=r"head.thresholds' must be in 0..1"):
        build(thresholds=[0.6, 0.7, 7.0])
    target = targets([10.0, 12, 40, 44])
    three = replace(target, points=target.points[:, :3], visible=target.visible[:, :3])  # type: ignore[index]
    with pytest.raises(ConfigError, match=r"5 points of each object, but the data has 3"):
        build().loss(MTCNNOutputs(torch.rand(1, 3, 64, 64), ((64, 64),)), (three,))
