"""Options of `python -m benchmarks`: those common to all benchmarks, and those that each adds."""

import os
from dataclasses import dataclass, field
from typing import Any, Literal

from detkit.errors import DetkitError


def usable_cores() -> int:
    """CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class BenchOptions:
    """Common to all benchmarks.

    Args:
        rounds: samples of each candidate, taken in turns with the others; default 30, with --quick 7.
        seconds: a candidate takes no more samples of a size once it has spent so long on it; default 0.5, with
            --quick 0.05.
        threads: CPU threads of torch and OpenCV.
        seed: of the made-up inputs.
        device: auto (the CPU, and a GPU where there is one), cpu, cuda.
        output: the JSON file to write; default <benchmark>-<hardware>.json in benchmarks/results.
        quick: small sizes and few rounds, for a first impression; what is given besides has precedence.
    """

    rounds: int | None = None
    seconds: float | None = None
    threads: int = 1
    seed: int = 0
    device: str = "auto"
    output: str | None = None
    quick: bool = False

    def __post_init__(self) -> None:
        for name, least in (("rounds", 1), ("seconds", 0), ("threads", 1)):
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise DetkitError(f"--{name} must be at least {least}, but is {value}.")
        if self.device not in ("auto", "cpu", "cuda"):
            raise DetkitError(f"--device must be auto, cpu or cuda, but is '{self.device}'.")

    def devices(self) -> list[str]:
        """Where to measure: "cpu", "cuda", or both.

        Raises:
            DetkitError: a GPU is asked for, and torch finds none.
        """
        import torch

        found = torch.cuda.is_available()
        if self.device == "cuda" and not found:
            raise DetkitError("--device is cuda, but torch finds no GPU. Leave the option out, or see `nvidia-smi`.")
        if self.device == "auto":
            return ["cpu", "cuda"] if found else ["cpu"]
        return [self.device]

    @property
    def round_count(self) -> int:
        """Samples of each candidate."""
        return self.rounds or (7 if self.quick else 30)

    @property
    def sample_seconds(self) -> float:
        """Seconds of samples of each candidate."""
        return self.seconds if self.seconds is not None else 0.05 if self.quick else 0.5


@dataclass(frozen=True)
class NmsOptions(BenchOptions):
    """Non-maximum suppression.

    Args:
        kinds: inputs, with commas between: detector, uniform, dense, batched; default all.
        sizes: numbers of boxes, with commas between; default 100,300,1000,3000,10000,30000,100000, with --quick
            100,1000,10000.
        iou: the threshold, 0..1.
        limit: a peer whose call would take more seconds, judged by the size before, is left out, and the table says
            so; detkit and torchvision are always measured.
        plot: draw boxes a second against their number, as PNG beside the JSON.
    """

    kinds: str | None = None
    sizes: str | None = None
    iou: float = 0.5
    limit: float = 4.0
    plot: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.iou <= 1:
            raise DetkitError(f"--iou must be in 0..1, but is {self.iou}.")

    @property
    def box_counts(self) -> list[int]:
        """Numbers of boxes, increasing."""
        default = "100,1000,10000" if self.quick else "100,300,1000,3000,10000,30000,100000"
        return sorted({_positive(text, "100,1000") for text in (self.sizes or default).split(",")})


@dataclass(frozen=True)
class IouOptions(BenchOptions):
    """Pairwise intersection over union.

    Args:
        sizes: boxes against boxes, with commas between; default 1000x1000,8732x20,100000x200, with --quick without
            the last.
    """

    sizes: str | None = None

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Rows and columns of each matrix."""
        return parse_shapes(self.sizes or ("1000x1000,8732x20" if self.quick else "1000x1000,8732x20,100000x200"))


@dataclass(frozen=True)
class MatchingOptions(BenchOptions):
    """Assignment of ground truths to anchors.

    Args: sizes: anchors against ground truths, with commas between; default 8732x8,100000x200, with --quick without the
        last.
    """

    sizes: str | None = None

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Anchors and ground truths of each case."""
        return parse_shapes(self.sizes or ("8732x8" if self.quick else "8732x8,100000x200"))


@dataclass(frozen=True)
class ModelOptions(BenchOptions):
    """Whole networks.

    Args:
        rounds: calls of each side, taken in turns; default 15, with --quick 3.
        seconds: of timing each side takes at most; default 300, with --quick 20. Comparing the results and measuring
            the memory comes on top.
        threads: default all cores that the process may use.
        models: torchvision's names of networks, with commas between; v2 of both R-CNNs can be had as well.
        source: an image, a folder of images, or a glob in quotes; default photographs that come with scikit-image,
            or made-up images where it is not installed.
        size: pixels of the network's input (of its shorter side in inference); default 512, with --quick 256. SSD300
            has its own.
    """

    threads: int = field(default_factory=usable_cores)
    models: str = "fasterrcnn_resnet50_fpn,maskrcnn_resnet50_fpn,ssd300_vgg16"
    source: str | None = None
    size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size is not None and self.size < 32:
            raise DetkitError(f"--size must be at least 32, but is {self.size}.")

    @property
    def round_count(self) -> int:
        return self.rounds or (3 if self.quick else 15)

    @property
    def sample_seconds(self) -> float:
        return self.seconds if self.seconds is not None else 20 if self.quick else 300

    @property
    def input_size(self) -> int:
        """Pixels."""
        return self.size or (256 if self.quick else 512)


@dataclass(frozen=True)
class InferenceOptions(ModelOptions):
    """From an image to boxes and masks, one image at a time.

    Args:
        models: torchvision's names of networks, with commas between, and yolox_s, yolox_m, yolox_l; v2 of both R-CNNs
            can be had as well.
        precision: of detkit: fp32, in which its detections must be torchvision's; auto, bf16 or fp16, in which those
            that differ are counted only, since random weights make much of rounding.
        compile: detkit's networks by TorchInductor.
        peer_python: a Python that has ultralytics, whose YOLO of equal FLOPs is then measured beside YOLOX.
    """

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    compile: bool = False
    peer_python: str | None = None


@dataclass(frozen=True)
class TrainStepOptions(ModelOptions):
    """Forward, loss, backward and a step of SGD.

    Args:
        batch: images of a step; default 2, of SSD300 8.
        precision: of detkit's step, as train.precision: fp32 (32-true) or bf16 (bf16-mixed); auto takes bf16 where the
            hardware multiplies it faster. The losses that are compared beforehand are always in fp32.
    """

    batch: int | None = None
    precision: Literal["auto", "fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch is not None and self.batch < 1:
            raise DetkitError(f"--batch must be at least 1, but is {self.batch}.")


LAST_STEPS = 10
"""Of a run, whose mean loss is compared."""


@dataclass(frozen=True)
class LearningOptions(TrainStepOptions):
    """The loss after some steps of training, beside torchvision's, for three seeds.

    Args:
        rounds, seconds: have no use here.
        steps: of each run; with --quick 10.
        lr: learning rate of both sides. SSD300, which has no norms and random weights here, needs 1e-4 or less.
        precision: of detkit's steps; torchvision's are in fp32.
    """

    steps: int = 50
    lr: float = 1e-3
    precision: Literal["auto", "fp32", "bf16"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < LAST_STEPS:
            raise DetkitError(f"--steps must be at least {LAST_STEPS}, but is {self.steps}.")
        if self.rounds is not None or self.seconds is not None:
            raise DetkitError("--rounds and --seconds have no use for learning, which times nothing. Give --steps.")

    @property
    def step_count(self) -> int:
        return LAST_STEPS if self.quick else self.steps


@dataclass(frozen=True)
class ProposalsOptions(BenchOptions):
    """Proposals by selective search, on images of data sets.

    Args:
        rounds: passes over the images; default 3, with --quick 1.
        seconds: has no use here.
        device: auto or cpu, which are the same here.
        data: the data set as in a config, '{name: coco, root: PATH}', or a list of such.
        config: a config whose `data` is the data set.
        split: of each data set.
        images: at most so many of each data set, the first; default 30, with --quick 5.
        mode: of selective search.
        longest_side: images with a longer side are shrunk to it beforehand, for all candidates.
        peer_python: a Python that has opencv-contrib-python; without it, OpenCV's selective search is left out.
        plot: draw recall against the number of proposals, as PNG beside the JSON.
    """

    data: dict[str, Any] | list[dict[str, Any]] | None = None
    config: str | None = None
    split: Literal["train", "val"] = "val"
    images: int | None = None
    mode: Literal["fast", "quality"] = "fast"
    longest_side: int = 640
    peer_python: str | None = None
    plot: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("images", "longest_side"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DetkitError(f"--{name} must be at least 1, but is {value}.")
        if self.seconds is not None:
            raise DetkitError("--seconds has no use for proposals: every image is timed. Give --rounds, --images.")
        if self.device == "cuda":
            raise DetkitError("Selective search runs on the CPU; leave out --device.")
        if (self.data is None) == (self.config is None):
            raise DetkitError(
                "The benchmark of proposals needs images with objects. Give either --config CONFIG.yaml or "
                "--data '{name: coco, root: PATH}'."
            )

    @property
    def round_count(self) -> int:
        """Passes over the images."""
        return self.rounds or (1 if self.quick else 3)

    @property
    def image_count(self) -> int:
        """Images of each data set."""
        return self.images or (5 if self.quick else 30)


@dataclass(frozen=True)
class ModelTableOptions(BenchOptions):
    """Parameters, FLOPs and time of whole networks, and the scores that they reached.

    Args:
        rounds: calls of each network, taken in turns; default 30, with --quick 3.
        seconds: default 60, with --quick 5.
        models: runs' folders, which have weights and scores, and configs, which get random weights, with commas
            between; globs are allowed, in quotes.
        classes: of a config that does not name its own.
        source: an image, of which a folder gives its first; default a photograph that comes with scikit-image.
    """

    models: str | None = None
    classes: int = 80
    source: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.classes < 1:
            raise DetkitError(f"--classes must be at least 1, but is {self.classes}.")
        if self.models is None:
            raise DetkitError(
                "The table needs models. Give runs' folders and configs, for example "
                "--models 'runs/detect/quickstart,configs/*_bccd.yaml'."
            )

    @property
    def round_count(self) -> int:
        return self.rounds or (3 if self.quick else 30)

    @property
    def sample_seconds(self) -> float:
        return self.seconds if self.seconds is not None else 5 if self.quick else 60


@dataclass(frozen=True)
class ScalingOptions(BenchOptions):
    """Growth of time and memory with pixels, batch, objects, classes and the size of the data set.

    Args:
        seconds: default 5, with --quick 0.2.
    """

    @property
    def sample_seconds(self) -> float:
        return self.seconds if self.seconds is not None else 0.2 if self.quick else 5


def parse_shapes(text: str) -> list[tuple[int, int]]:
    """ "8732x20,1000x1000" as [(8732, 20), (1000, 1000)].

    Raises:
        DetkitError: a part is not two positive numbers with an x between.
    """
    shapes = []
    for part in text.split(","):
        rows, x, columns = part.partition("x")
        if not x:
            raise DetkitError(f"--sizes holds '{part.strip()}', which is not two numbers. Write them as 8732x20.")
        shapes.append((_positive(rows, "8732x20"), _positive(columns, "8732x20")))
    return shapes


def _positive(text: str, example: str) -> int:
    if not text.strip().isdecimal() or int(text) == 0:
        raise DetkitError(f"--sizes holds '{text.strip()}', which is no positive number. Write them as {example}.")
    return int(text)
