"""Files of weights that YOLOX's authors publish: each size loads, and predicts what a forward pass written from the
names in the file predicts. The weights here are random, under the published names and of the published shapes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import detkit
from detkit.config import Experiment, load_experiment
from detkit.errors import CheckpointError
from detkit.model import Model, build_model, load_model
from detkit.published.yolox import convert_yolox
from detkit.structures import ClassList, Inputs

# name: bottlenecks of the shortest stage, channels of the stem, depthwise, side of the input
SIZES = {
    "yolox_nano": (1, 16, True, 416),
    "yolox_tiny": (1, 24, False, 416),
    "yolox_s": (1, 32, False, 640),
    "yolox_m": (2, 48, False, 640),
    "yolox_l": (3, 64, False, 640),
    "yolox_x": (4, 80, False, 640),
}
PARAMETERS = {"yolox_nano": 0.91, "yolox_tiny": 5.06, "yolox_s": 9.0, "yolox_m": 25.3, "yolox_l": 54.2, "yolox_x": 99.1}
"""In millions, as the authors' table has them."""


class Names:
    """Collects tensors of the published names, with random values, or with none at all on the device meta."""

    def __init__(self, device: str) -> None:
        self.state: dict[str, Tensor] = {}
        self.device, self.random = device, torch.Generator().manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        if self.device == "meta":
            return torch.empty(*shape, device="meta")
        return torch.randn(*shape, generator=self.random)

    def unit(self, name: str, inputs: int, outputs: int, kernel: int, groups: int = 1) -> None:
        fan_in = inputs // groups * kernel**2
        self.state[f"{name}.conv.weight"] = self.normal(outputs, inputs // groups, kernel, kernel) * fan_in**-0.5
        self.state[f"{name}.bn.weight"] = 1 + 0.1 * self.normal(outputs)
        self.state[f"{name}.bn.bias"] = 0.2 * self.normal(outputs)
        self.state[f"{name}.bn.running_mean"] = torch.zeros(outputs)
        self.state[f"{name}.bn.running_var"] = torch.ones(outputs)
        self.state[f"{name}.bn.num_batches_tracked"] = torch.tensor(7)

    def three(self, name: str, inputs: int, outputs: int, depthwise: bool) -> None:
        if depthwise:
            self.unit(f"{name}.dconv", inputs, inputs, 3, groups=inputs)
            self.unit(f"{name}.pconv", inputs, outputs, 1)
        else:
            self.unit(name, inputs, outputs, 3)

    def csp(self, name: str, inputs: int, outputs: int, blocks: int, depthwise: bool) -> None:
        half = outputs // 2
        self.unit(f"{name}.conv1", inputs, half, 1)
        self.unit(f"{name}.conv2", inputs, half, 1)
        self.unit(f"{name}.conv3", 2 * half, outputs, 1)
        for block in range(blocks):
            self.unit(f"{name}.m.{block}.conv1", half, half, 1)
            self.three(f"{name}.m.{block}.conv2", half, half, depthwise)


def published(
    blocks: int, stem: int, depthwise: bool, classes: int = 80, bgr: Tensor | None = None, device: str = "cpu"
) -> dict[str, Tensor]:
    """A state dict as the authors' file holds it under "model", with norms that fit an image."""
    names = Names(device)
    trunk, c = "backbone.backbone", [stem, 2 * stem, 4 * stem, 8 * stem, 16 * stem]
    names.unit(f"{trunk}.stem.conv", 12, stem, 3)
    for stage in (2, 3, 4, 5):
        names.three(f"{trunk}.dark{stage}.0", c[stage - 2], c[stage - 1], depthwise)
        many = 3 * blocks if stage in (3, 4) else blocks
        names.csp(f"{trunk}.dark{stage}.{2 if stage == 5 else 1}", c[stage - 1], c[stage - 1], many, depthwise)
    names.unit(f"{trunk}.dark5.1.conv1", c[4], c[4] // 2, 1)
    names.unit(f"{trunk}.dark5.1.conv2", c[4] * 2, c[4], 1)
    fine, middle, coarse = c[2:]
    names.unit("backbone.lateral_conv0", coarse, middle, 1)
    names.csp("backbone.C3_p4", 2 * middle, middle, blocks, depthwise)
    names.unit("backbone.reduce_conv1", middle, fine, 1)
    names.csp("backbone.C3_p3", 2 * fine, fine, blocks, depthwise)
    names.three("backbone.bu_conv2", fine, fine, depthwise)
    names.csp("backbone.C3_n3", 2 * fine, middle, blocks, depthwise)
    names.three("backbone.bu_conv1", middle, middle, depthwise)
    names.csp("backbone.C3_n4", 2 * middle, coarse, blocks, depthwise)
    for level, channels in enumerate((fine, middle, coarse)):
        names.unit(f"head.stems.{level}", channels, fine, 1)
        for kind in ("cls", "reg"):
            for layer in (0, 1):
                names.three(f"head.{kind}_convs.{level}.{layer}", fine, fine, depthwise)
        # spread out, but sides of at most some hundred cells
        for kind, outputs, mean, gain in (("cls", classes, -1.0, 1.0), ("reg", 4, 0.5, 0.4), ("obj", 1, -1.0, 1.0)):
            names.state[f"head.{kind}_preds.{level}.weight"] = names.normal(outputs, fine, 1, 1) * gain * fine**-0.5
            names.state[f"head.{kind}_preds.{level}.bias"] = mean + 0.3 * names.normal(outputs)
    # Statistics that keep the maps in bounds, as those of a trained network do.
    if device != "meta":
        Reference(names.state, fit=True)(tensor_of(picture(64, 96)) if bgr is None else bgr)
    return names.state


class Reference:
    """The forward pass and post-processing as the paper and the authors' repository describe them, without modules."""

    def __init__(self, state: dict[str, Tensor], fit: bool = False) -> None:
        self.state, self.fit = state, fit

    def unit(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = self.state[f"{name}.conv.weight"]
        groups = x.shape[1] // weight.shape[1]
        x = F.conv2d(x, weight, None, stride, (weight.shape[2] - 1) // 2, groups=groups)
        if self.fit:
            self.state[f"{name}.bn.running_mean"] = x.mean((0, 2, 3))
            self.state[f"{name}.bn.running_var"] = x.var((0, 2, 3)) + 1e-2
        mean, variance, scale, shift = (
            self.state[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        x = F.batch_norm(x, mean, variance, scale, shift, training=False, eps=1e-3)
        return x * torch.sigmoid(x)

    def three(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        if f"{name}.dconv.conv.weight" in self.state:
            return self.unit(f"{name}.pconv", self.unit(f"{name}.dconv", x, stride))
        return self.unit(name, x, stride)

    def csp(self, name: str, x: Tensor, shortcut: bool) -> Tensor:
        first, second = self.unit(f"{name}.conv1", x), self.unit(f"{name}.conv2", x)
        block = 0
        while f"{name}.m.{block}.conv1.conv.weight" in self.state:
            y = self.three(f"{name}.m.{block}.conv2", self.unit(f"{name}.m.{block}.conv1", first))
            first = first + y if shortcut else y
            block += 1
        return self.unit(f"{name}.conv3", torch.cat((first, second), 1))

    def trunk(self, x: Tensor) -> list[Tensor]:
        trunk = "backbone.backbone"
        x = torch.cat((x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]), 1)
        x = self.unit(f"{trunk}.stem.conv", x)
        maps = []
        for stage in (2, 3, 4):
            x = self.csp(f"{trunk}.dark{stage}.1", self.three(f"{trunk}.dark{stage}.0", x, 2), True)
            maps.append(x)
        x = self.unit(f"{trunk}.dark5.1.conv1", self.three(f"{trunk}.dark5.0", x, 2))
        x = torch.cat([x, *(F.max_pool2d(x, side, 1, side // 2) for side in (5, 9, 13))], 1)
        x = self.csp(f"{trunk}.dark5.2", self.unit(f"{trunk}.dark5.1.conv2", x), False)
        return [*maps[1:], x]

    def neck(self, maps: list[Tensor]) -> list[Tensor]:
        fine, middle, coarse = maps
        low = self.unit("backbone.lateral_conv0", coarse)
        up = F.interpolate(low, scale_factor=2, mode="nearest")
        between = self.unit("backbone.reduce_conv1", self.csp("backbone.C3_p4", torch.cat((up, middle), 1), False))
        up = F.interpolate(between, scale_factor=2, mode="nearest")
        fine = self.csp("backbone.C3_p3", torch.cat((up, fine), 1), False)
        down = self.three("backbone.bu_conv2", fine, 2)
        middle = self.csp("backbone.C3_n3", torch.cat((down, between), 1), False)
        down = self.three("backbone.bu_conv1", middle, 2)
        return [fine, middle, self.csp("backbone.C3_n4", torch.cat((down, low), 1), False)]

    def __call__(self, bgr: Tensor) -> Tensor:
        """(A, 5 + C) centre, sides, objectness and class scores of one image (1, 3, H, W), BGR in 0..255."""
        rows = []
        for level, x in enumerate(self.neck(self.trunk(bgr))):
            x = self.unit(f"head.stems.{level}", x)
            branches = {}
            for kind in ("cls", "reg"):
                y = self.three(f"head.{kind}_convs.{level}.0", x)
                branches[kind] = self.three(f"head.{kind}_convs.{level}.1", y)
            raw = [
                F.conv2d(branches[branch], *(self.state[f"head.{kind}_preds.{level}.{part}"] for part in PREDICTOR))[0]
                for kind, branch in (("reg", "reg"), ("obj", "reg"), ("cls", "cls"))
            ]
            stride = 8 * 2**level
            for row in range(x.shape[2]):
                for column in range(x.shape[3]):
                    dx, dy, w, h = raw[0][:, row, column]
                    box = torch.stack((dx + column, dy + row, w.exp(), h.exp())) * stride
                    rows.append(torch.cat((box, raw[1][:, row, column].sigmoid(), raw[2][:, row, column].sigmoid())))
        return torch.stack(rows)


PREDICTOR = ("weight", "bias")


def postprocess(rows: Tensor, threshold: float, iou_threshold: float) -> list[tuple[Tensor, float, int]]:
    """(box, score, label) best first: score = objectness x best class, then suppression by class, in plain loops."""
    found = []
    for row in rows:
        label = int(row[5:].argmax())
        score = float(row[4] * row[5 + label])
        if score > threshold:
            box = torch.cat((row[:2] - row[2:4] / 2, row[:2] + row[2:4] / 2))
            found.append((box, score, label))
    found.sort(key=lambda item: -item[1])
    kept: list[tuple[Tensor, float, int]] = []
    for box, score, label in found:
        if all(other != label or overlap(box, last) <= iou_threshold for last, _, other in kept):
            kept.append((box, score, label))
    return kept


def overlap(a: Tensor, b: Tensor) -> float:
    sides = (torch.minimum(a[2:], b[2:]) - torch.maximum(a[:2], b[:2])).clamp(min=0)
    union = (a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - sides.prod()
    return float(sides.prod() / union)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    coarse = torch.from_numpy(random.random((1, 3, 5, 6), dtype=np.float32))
    smooth = F.interpolate(coarse, (height, width), mode="bicubic")[0].permute(1, 2, 0).numpy()
    return (np.clip(smooth + random.normal(0, 0.1, smooth.shape), 0, 1) * 255).astype(np.uint8)


def tensor_of(image: np.ndarray) -> Tensor:
    """(1, 3, H, W) BGR in 0..255, what the published networks read."""
    return torch.from_numpy(image).permute(2, 0, 1)[None].float().flip(1)


def model_of(experiment: Experiment, classes: ClassList) -> Model:
    """Without random weights, of which the largest has 99 million."""
    with torch.device("meta"):
        return build_model(experiment, classes)


@pytest.mark.parametrize("name", SIZES)
def test_every_size_is_told_from_its_shapes_and_its_config_trains_the_same_network(name: str) -> None:
    blocks, stem, depthwise, side = SIZES[name]
    tensors, experiment, classes = convert_yolox(published(blocks, stem, depthwise, device="meta"))
    assert (experiment.name, experiment.input.size) == (name, (side, side))
    model = model_of(experiment, classes)
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert parameters == pytest.approx(PARAMETERS[name], rel=0.01)
    shapes = {key: tensor.shape for key, tensor in tensors.items()}
    assert {key: tensor.shape for key, tensor in model.state_dict().items()} == shapes
    config = load_experiment([str(Path(__file__).parents[2] / "configs" / f"{name}.yaml")], ["--data.root", "/nowhere"])
    # Sizes that only training varies are no part of a published network; its authors predict with all of the padding.
    published_input = replace(config.input, multi_scale=None, trim_padding=False)
    assert (config.name, published_input) == (experiment.name, experiment.input)
    assert {key: tensor.shape for key, tensor in model_of(config, classes).state_dict().items()} == shapes


@torch.no_grad()
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name[-1] in "lx" else name for name in SIZES]
)
def test_raw_outputs_agree(name: str) -> None:
    blocks, stem, depthwise, _ = SIZES[name]
    state = published(blocks, stem, depthwise)
    tensors, experiment, classes = convert_yolox(state)
    model = model_of(experiment, classes).eval()
    model.load_state_dict(tensors, assign=True)
    # Over so many layers of random weights, single precision leaves two digits.
    bgr = tensor_of(picture(64, 96)).double()
    sizes = Inputs((64, 96), ((64, 96),))
    outputs = model.double().head(model.neck(model.backbone(bgr.flip(1))), sizes)
    expected = Reference({key: tensor.double() for key, tensor in state.items()})(bgr).float()
    assert expected[:, 4].std() > 0.01
    boxes = torch.cat((expected[:, :2] - expected[:, 2:4] / 2, expected[:, :2] + expected[:, 2:4] / 2), 1)
    torch.testing.assert_close(outputs.boxes()[0], boxes, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(outputs.objectness[0].sigmoid(), expected[:, 4], rtol=0, atol=1e-6)
    torch.testing.assert_close(outputs.class_logits[0].sigmoid(), expected[:, 5:], rtol=0, atol=1e-6)


@torch.no_grad()
def test_detections_agree_with_the_authors_rule(tmp_path: Path) -> None:
    image = picture(64, 96)
    # Twice the image fills the width of this input; what is left below is grey.
    bgr = F.pad(F.interpolate(tensor_of(image), (128, 192), mode="bilinear"), (0, 0, 0, 32), value=114.0)
    state = published(1, 16, False, classes=5, bgr=bgr)
    # what the authors' program saves, numbers of NumPy and all
    torch.save({"model": state, "start_epoch": 300, "best_ap": np.float64(0.4)}, tmp_path / "own.pth")
    detector = detkit.load(str(tmp_path / "own.pth"), precision="fp32")
    assert detector.model.classes.names == tuple(f"class {label}" for label in range(5))
    detector.model.fit.size = (160, 192)
    found = detector.predict(image, conf=0.15)
    expected = postprocess(Reference(state)(bgr), 0.15, 0.65)
    assert len(found) == len(expected) > 20
    assert len(set(found.labels.tolist())) > 1
    limits = torch.tensor([96.0, 64, 96, 64])
    torch.testing.assert_close(found.scores, torch.tensor([score for _, score, _ in expected]), rtol=0, atol=1e-4)
    # Scores closer than the tolerance may swap places; compare each detection with its own counterpart.
    for label in range(5):
        mine = found.boxes[found.labels == label]
        theirs = [(box / 2).clamp(min=0).minimum(limits) for box, _, other in expected if other == label]
        distance = (mine[:, None] - torch.stack(theirs)[None]).abs().amax(-1)
        assert distance.shape == (len(theirs), len(theirs))
        assert distance.amin(0).max() < 0.02
        assert distance.amin(1).max() < 0.02


def test_coco_classes_and_broken_files(tmp_path: Path) -> None:
    state = published(1, 16, True)
    _, experiment, classes = convert_yolox(state)
    assert len(classes) == 80
    assert (classes.names[0], classes.raw_ids[0]) == ("person", 1)
    assert (classes.names[79], classes.raw_ids[79]) == ("toothbrush", 90)
    assert experiment.input.resize == "letterbox"
    with pytest.raises(CheckpointError, match=r"'neck\.extra' is not a tensor of YOLOX"):
        convert_yolox({**state, "neck.extra": torch.zeros(1)})
    for missing, match in (
        ("head.cls_preds.0.bias", r"lacks head\.cls_preds\.0\.bias"),
        ("backbone.C3_n3.conv1.bn.bias", r"lacks the tensor 'neck\.C3_n3\.conv1\.bn\.bias'"),
        ("backbone.backbone.stem.conv.conv.weight", "is not a torchvision model"),
    ):
        torch.save({"model": {n: tensor for n, tensor in state.items() if n != missing}}, tmp_path / "cut.pth")
        with pytest.raises(CheckpointError, match=match):
            load_model(tmp_path / "cut.pth")
