"""Time of training by stage, and which stage limits it."""

import time
from collections import defaultdict
from typing import Any

IMAGES, STORED, NETWORK, VALIDATION = "waiting for images", "stored features", "network", "validation"
FORWARD, BACKWARD, STEP = "forward and loss", "backward", "step"
REST = "reports and saving"
NOTICEABLE = 0.1
"""Fraction of the time spent waiting for images above which they are said to limit the run."""


class Stopwatch:
    """Accumulates seconds by stage; each lap adds the time since the previous one to a stage.

    Args:
        detailed: record forward, backward and step separately. On a GPU, which runs asynchronously, this would need
            synchronisation, which slows the run down; their sum is right without.

    Attributes:
        seconds: time of each stage so far.
    """

    def __init__(self, detailed: bool) -> None:
        self.detailed = detailed
        self.seconds: dict[str, float] = defaultdict(float)
        self._last = time.perf_counter()

    def start(self) -> None:
        """Start a lap; the time since the previous one is discarded."""
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """End a lap of `stage` and start the next."""
        now = time.perf_counter()
        if not self.detailed and stage in (FORWARD, BACKWARD, STEP):
            stage = NETWORK
        self.seconds[stage] += now - self._last
        self._last = now

    def shares(self) -> dict[str, float]:
        """Fraction of the time by stage, in descending order."""
        total = sum(self.seconds.values()) or 1.0
        return {name: value / total for name, value in sorted(self.seconds.items(), key=lambda item: -item[1])}


def verdict(watch: Stopwatch, options: Any, cores: int) -> str:
    """Describe in one line the share of each stage, which stage limits the run, and the remedy.

    Images limit a run if it waits for them noticeably: workers read while the network computes, so the one that waits
    is the faster.

    Args:
        options: training options `workers`, `cache` and `validate_every`.
        cores: number of cores that this process may use.
    """
    shares = watch.shares()
    parts = ", ".join(f"{share:.0%} {name}" for name, share in shares.items() if share >= 0.005)
    waiting, validation = shares.get(IMAGES, 0.0), shares.get(VALIDATION, 0.0)
    rest = shares.get(REST, 0.0)
    if waiting >= NOTICEABLE and options.workers == 0 and waiting < max(shares.values()):
        return f"{parts}; the network limits this run, but train.workers 1 would read images meanwhile"
    if waiting >= NOTICEABLE:
        remedies = [f"raise train.workers from {options.workers}"] * (options.workers < cores)
        remedies += ["set train.cache, which keeps decoded images"] * (options.cache is None)
        remedies += ["use smaller image files or fewer augmentations"] * (not remedies)
        return f"{parts}; images limit this run: {', or '.join(remedies)}"
    if validation > 1 - waiting - validation - rest:
        return f"{parts}; validation limits this run: raise train.validate_every from {options.validate_every}"
    return f"{parts}; the network limits this run"
