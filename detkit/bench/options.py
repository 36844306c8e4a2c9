"""What `detkit bench` takes: one list of options, common to all benchmarks, and what each adds."""

from dataclasses import dataclass

from detkit.errors import DetkitError


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
        output: the JSON file to write; default <benchmark>-<hardware>.json in benchmarks/results where that folder
            exists, else in the current one.
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
    """Assignment of truths to anchors.

    Args:
        sizes: anchors against truths, with commas between; default 8732x8,100000x200, with --quick without the last.
    """

    sizes: str | None = None

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Anchors and truths of each case."""
        return parse_shapes(self.sizes or ("8732x8" if self.quick else "8732x8,100000x200"))


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
