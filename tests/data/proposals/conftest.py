"""The toy source and the toy head, registered for one test at a time."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toys import Grid, RegionHead

from detkit.config import Experiment
from detkit.registry import heads, proposal_sources


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    heads.names(), proposal_sources.names()
    monkeypatch.setitem(heads._parts, "regions", RegionHead)
    monkeypatch.setitem(proposal_sources._parts, "grid", Grid)
    for seen in (Grid.calls, RegionHead.seen, RegionHead.loss_dtypes):
        seen.clear()  # type: ignore[attr-defined]


@pytest.fixture
def regions(toys: None, tiny: Any, tmp_path: Path) -> Callable[..., Experiment]:
    """The tiny experiment with the toy head and source."""
    options = ["--head", "{name: regions}", "--proposals", f"{{name: grid, cache: {tmp_path / 'cache'}}}"]
    return lambda *overrides: tiny(*options, *overrides)
