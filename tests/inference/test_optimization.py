"""A model made fast gives what the plain one gives."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch._inductor.exc import CppCompileError, InductorError
from zoo_cases import zoo_cases

from detkit.boxes.iou import pairwise_iou
from detkit.config import load_experiment
from detkit.errors import ConfigError
from detkit.inference.compilation import compiler_errors, with_sizes
from detkit.inference.optimization import bf16_instructions, choose_precision, fold_batch_norms, rounded
from detkit.inference.predictor import Predictor
from detkit.model import Model, build_model
from detkit.structures import ClassList, Detections

CPU = torch.device("cpu")
CLASSES = ClassList.from_names(("red", "green", "blue"))
PYRAMID = ["--backbone.name", "resnet18", "--neck.name", "fpn", "--neck.width", "32", "--neck.norm", "true"]
FAMILIES: dict[str, list[str]] = {
    "ssd": ["--backbone.name", "small_ssd", "--head.name", "ssd", "--head.tower", "1"],
    "retinanet": [*PYRAMID, "--head", "{name: retinanet}"],
    "faster_rcnn": [*PYRAMID, "--head", "{name: faster_rcnn}", "--input.resize", "short_side"],
    "yolox": [
        *["--backbone", "{name: csp_darknet, width: 0.125}", "--neck", "{name: pafpn}", "--head.name", "yolox"],
        *["--input.resize", "letterbox"],
    ],
    "timm": ["--backbone", "{name: timm, network: tf_efficientnet_lite0}", "--head.name", "ssd"],
    **zoo_cases("OPTIMISED"),
}


def build(family: str) -> Model:
    """With norms that are not the identity, as after a training."""
    experiment = load_experiment(
        [], ["--data.name", "shapes", "--backbone.name", "small_ssd", "--input.size", "[96, 128]", *FAMILIES[family]]
    )
    torch.manual_seed(0)
    model = build_model(experiment, CLASSES, load_weights=False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return model.eval()


def picture(height: int = 80, width: int = 120, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def raw(model: Model) -> list[Tensor]:
    with torch.no_grad():
        features = model.backbone(torch.rand(1, 3, 96, 128, generator=torch.Generator().manual_seed(1)))
        return features if model.neck is None else list(model.neck(features))


@pytest.mark.parametrize("family", FAMILIES)
def test_folding_leaves_no_batch_norm_and_changes_only_rounding(family: str) -> None:
    model = build(family)
    before, norms = raw(model), sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert fold_batch_norms(model) == norms > 0
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    for one, other in zip(before, raw(model)):
        assert (one - other).abs().max() <= 1e-4 * one.abs().max()


class Tricky(nn.Module):
    """Norms in front of convolutions, behind an activation, of a convolution that serves two, of one that is shared."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.conv2, self.act, self.bn2 = nn.Conv2d(3, 3, 1), nn.ReLU(inplace=True), nn.BatchNorm2d(3)
        self.conv3, self.bn3, self.bn4 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, images: Tensor) -> Tensor:
        features = self.conv1(self.bn1(images))
        features = self.bn2(self.act(self.conv2(features)))
        result: Tensor = self.bn3(self.conv3(features)) + self.bn4(self.conv3(2 * features))
        return result


def test_norms_that_follow_no_convolution_of_their_own_stay() -> None:
    model = build("ssd")
    model.backbone.tricky = Tricky().eval()
    inner = model.backbone.forward
    model.backbone.forward = lambda images: inner(model.backbone.tricky(images))  # type: ignore[method-assign, operator]
    fold_batch_norms(model)
    assert all(isinstance(getattr(model.backbone.tricky, f"bn{number}"), nn.BatchNorm2d) for number in (1, 2, 3, 4))


class Shared(nn.Module):
    """Convolutions whose output something besides a norm reads: a shortcut, another norm, a layer; but the last."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(5))
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(5))
        for norm in self.norms:
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)

    def forward(self, images: Tensor) -> Tensor:
        first, second, third, fourth, fifth = self.convolutions
        features = first(images)
        features = features + self.norms[0](features)
        features = second(features)
        features = self.norms[1](features).relu() + self.norms[2](features)
        features = third(features)
        features = fourth(features) + self.norms[3](features)
        result: Tensor = self.norms[4](fifth(features))
        return result


def test_norms_of_convolutions_that_something_else_reads_stay() -> None:
    torch.manual_seed(0)
    model = build("ssd")
    model.backbone.shared = shared = Shared().eval()
    inner = model.backbone.forward
    model.backbone.forward = lambda images: inner(shared(images))  # type: ignore[method-assign]
    before, others = raw(model), sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) - 5
    assert fold_batch_norms(model) == others + 1
    assert [isinstance(norm, nn.BatchNorm2d) for norm in shared.norms] == [True, True, True, True, False]
    for one, other in zip(before, raw(model)):
        assert (one - other).abs().max() <= 1e-4 * one.abs().max()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def agree(one: Detections, other: Detections, overlap: float, difference: float) -> float:
    """The part of both that has a counterpart."""
    same = pairwise_iou(one.boxes, other.boxes) > overlap
    # Of those in the padding nothing is left inside the image, and the IoU of nothing is 0.
    same |= (one.boxes[:, None] - other.boxes).abs().amax(-1) < 0.01
    same &= (one.labels[:, None] == other.labels) & ((one.scores[:, None] - other.scores).abs() < difference)
    return float((same.any(1).sum() + same.any(0).sum()) / (len(one) + len(other)))


@pytest.mark.skipif(not bf16_instructions(CPU), reason="this processor has no instructions for bf16")
@pytest.mark.parametrize(
    "family", ["ssd", "yolox", *zoo_cases("OPTIMISED")]
)  # random weights of many layers make much of rounding
def test_half_precision_finds_the_same(family: str) -> None:
    whole = Predictor(build(family), "cpu")
    half = Predictor(build(family), "cpu", precision="bf16")
    for seed in range(3):
        image = picture(seed=seed)
        found, expected = half.predict(image, conf=0.0), whole.predict(image, conf=0.0)
        assert len(expected) > 5
        assert agree(found, expected, overlap=0.9, difference=0.02) > 0.9


def test_the_choices_are_said() -> None:
    model = build("timm")
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    choices = Predictor(model, "cpu", precision="fp32").network.choices
    assert choices == f"cpu, fp32, channels_last, {norms} batch norms folded, not compiled"


@pytest.mark.parametrize(
    ("precision", "has", "chosen"),
    [
        ("auto", {"amx_bf16": True, "avx512_bf16": True}, ("bf16", "AMX")),
        (
            "auto",
            {"avx512_bf16": True},
            (
                "fp32",
                "no matrix units for bf16 on this cpu, but --precision bf16, using AVX512-BF16, is faster and changes "
                "some boxes",
            ),
        ),
        ("auto", {}, ("fp32", "no matrix units for bf16 on this cpu")),
        ("bf16", {"avx512_bf16": True}, ("bf16", "AVX512-BF16")),
        ("fp32", {"avx512_bf16": True}, ("fp32", "")),
    ],
)
def test_the_precision_follows_the_processor(
    precision: Any, has: dict[str, bool], chosen: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    assert choose_precision(precision, CPU) == chosen


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        ("bf16", "This cpu has no bf16 instructions.*--precision auto or fp32"),
        ("fp16", "fp16 is for GPUs, but the device is 'cpu'"),
        ("int8", "'precision' must be auto, fp32, bf16 or fp16, but is 'int8'"),
    ],
)
def test_a_precision_that_is_not_to_be_had_is_refused(
    precision: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {})
    with pytest.raises(ConfigError, match=message):
        choose_precision(precision, CPU)


def test_compiling_without_a_compiler_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler.*packages g\+\+"):
        Predictor(build("ssd"), "cpu", compile=True)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            "In file included from a.cpp:2:\na.h:3: fatal error: omp.h: not found\ncompilation terminated.",
            "a.h:3: fatal",
        ),
        ("ld: cannot find -lgomp\n\n", "does not work: ld: cannot find -lgomp. Install"),
        ("", "does not work: no output. Install"),
    ],
)
def test_what_the_compiler_said_is_told(said: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "ccache g++-99")
    failure = InductorError(CppCompileError(["g++", "a.cpp"], said), None)
    with (
        pytest.raises(ConfigError, match=r"ccache g\+\+-99 does not work.*omit --compile") as error,
        compiler_errors(),
    ):
        raise failure
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_a_network_that_cannot_be_compiled_is_no_fault_of_the_compiler() -> None:
    with pytest.raises(ConfigError, match=r"this network \(KeyError: 'x'\)\. Omit --compile"), compiler_errors():
        raise InductorError(KeyError("x"), None)
    with pytest.raises(KeyError), compiler_errors():
        raise KeyError


@pytest.mark.slow
def test_a_compiler_that_fails_ends_the_command_with_one_paragraph(tmp_path: Path) -> None:
    """In a process of its own, since torch remembers what the compiler can do."""
    compiler = tmp_path / "c++"
    compiler.write_text(
        "#!/bin/sh\ncase $1 in *version) echo g++ 12.2.0; exit 0;; esac\necho 'error: no omp.h' >&2\nexit 1\n"
    )
    compiler.chmod(0o755)
    build("ssd").save(tmp_path / "model.safetensors")
    Image.fromarray(picture()).save(tmp_path / "picture.png")
    arguments = ["infer", "model.safetensors", "--source", "picture.png", "--device", "cpu", "--compile"]
    result = subprocess.run(
        [sys.executable, "-m", "detkit", *arguments],
        cwd=tmp_path,
        env={**os.environ, "CXX": str(compiler), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert f"detkit: --compile needs a C++ compiler with OpenMP, but {compiler} does not work" in result.stderr
    assert "error: no omp.h. Install it" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("shape", [(8, 4, 3, 3), (5, 1, 5, 5), (4, 6, 1, 1)])
def test_rounding_keeps_the_sum_of_each_kernel(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    half = rounded(weight, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    step = torch.finfo(torch.bfloat16).eps * weight.abs().amax()
    assert ((half.float() - weight).abs() <= step).all()
    # As far off as one weight alone, not as all together.
    assert ((half.float().sum((2, 3)) - weight.sum((2, 3))).abs() <= step / 2 + 1e-6).all()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["yolox", "ssd", "faster_rcnn"])
def test_a_compiled_network_serves_all_sizes_and_finds_the_same(
    family: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, compiled = Predictor(build(family), "cpu"), Predictor(build(family), "cpu", compile=True)
    graphs = []
    for seed, (height, width) in enumerate([(80, 120), (120, 80), (96, 128), (200, 90), (64, 64), (150, 140)]):
        image = picture(height, width, seed)
        found, expected = compiled.predict(image, conf=0.0), plain.predict(image, conf=0.0)
        assert agree(found, expected, overlap=0.99, difference=1e-3) > 0.98
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    # Torch itself chooses other code for maps of less than 20,480 values, so that there may be a second version.
    assert graphs[-1] <= (1 if compiled.model.fit.one_size else 2) * graphs[0]


@pytest.mark.slow
def test_what_was_compiled_is_kept_for_the_next_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    for number in (1, 2):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        Predictor(build("yolox"), "cpu", compile=True).predict(picture())
        counted = torch._dynamo.utils.counters["inductor"]
        assert bool(counted["fxgraph_cache_miss"]) == (number == 1)
        assert bool(counted["fxgraph_cache_hit"]) == (number == 2)


def test_sizes_are_put_back_where_named_tuples_hold_them() -> None:
    model = build("faster_rcnn")
    with torch.no_grad():
        outputs = model(torch.zeros(1, 3, 96, 128), ((96, 128),))
    changed = with_sizes(outputs, ((90, 100),))
    assert changed.proposals.sizes == ((90, 100),)
    assert changed.proposals.offsets is outputs.proposals.offsets
    assert outputs.proposals.sizes == ((96, 128),)


@pytest.mark.skipif(not bf16_instructions(torch.device("cpu")), reason="this processor has no instructions for bf16")
def test_a_model_in_half_precision_is_not_taken_twice() -> None:
    model = Predictor(build("ssd"), "cpu", precision="bf16").model
    with pytest.raises(ConfigError, match="not in float32"):
        Predictor(model, "cpu")
