"""Where the time of training goes, and which stage limits it."""

import time
from collections import defaultdict
from typing import Any

IMAGES, STORED, NETWORK, VALIDATION = "waiting for images", "stored features", "network", "validation"
FORWARD, BACKWARD, STEP = "forward and loss", "backward", "step"
REST = "reports and saving"
NOTICEABLE = 0.1
"""Of the time: who waits longer for images than that would be as much faster if they came in time."""


class Stopwatch:
    """Seconds by stage; a lap adds the time since the last one to a stage.

    Args:
        detailed: whether the parts of the network are told apart. A GPU works on while Python goes on, so that a part's
            time there is known only by waiting for its end, which would slow the run down; their sum is right anyway.

    Attributes:
        seconds: of each stage so far.
    """

    def __init__(self, detailed: bool) -> None:
        self.detailed = detailed
        self.seconds: dict[str, float] = defaultdict(float)
        self._last = time.perf_counter()

    def start(self) -> None:
        """Begin a lap here; what was since the last one belongs to no stage."""
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """End a lap of `stage`, and begin the next."""
        now = time.perf_counter()
        if not self.detailed and stage in (FORWARD, BACKWARD, STEP):
            stage = NETWORK
        self.seconds[stage] += now - self._last
        self._last = now

    def shares(self) -> dict[str, float]:
        """Of the time, by stage, largest first."""
        total = sum(self.seconds.values()) or 1.0
        return {name: value / total for name, value in sorted(self.seconds.items(), key=lambda item: -item[1])}


def verdict(watch: Stopwatch, options: Any, cores: int) -> str:
    """One line: the share of each stage, which of them limits the run, and what would help.

    Images limit a run as soon as it waits for them noticeably: workers read while the network computes, so that who
    waits is the faster of the two.

    Args:
        options: of training: `workers`, `cache`, `validate_every`.
        cores: that this process may use.
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
