"""The cache of proposals: found by pixels and options, whole or not there."""

import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from toys import Grid, grid

from detkit.data.proposals.cache import ProposalCache, default_folder
from detkit.errors import WriteError


def picture(height: int = 20, width: int = 30, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)


def test_an_image_is_computed_once(tmp_path: Path) -> None:
    Grid.calls.clear()
    first = ProposalCache(Grid(), tmp_path)
    assert [first.get(picture(), name)[1] for name in ("a", "b", 3)] == ["computed", "cached", "cached"]
    found, outcome = ProposalCache(Grid(), tmp_path).get(picture(), "a")
    assert outcome == "cached"
    assert torch.equal(found, grid(20, 30))
    assert found.dtype == torch.float32
    assert len(Grid.calls) == 1


def test_what_the_proposals_depend_on_tells_files_apart(tmp_path: Path) -> None:
    cache = ProposalCache(Grid(), tmp_path)
    cache.get(picture(), "a")
    changed = picture()
    changed[7, 8, 2] ^= 1
    turned = picture().reshape(30, 20, 3)
    assert cache.get(changed, "a")[1] == cache.get(turned, "a")[1] == "computed"
    assert ProposalCache(Grid(side=8), tmp_path).get(picture(), "a")[1] == "computed"
    assert len(list(tmp_path.rglob("*.boxes"))) == 4
    assert sorted(path.read_text() for path in tmp_path.rglob("source.txt")) == ["grid 16 1 -1\n", "grid 8 1 -1\n"]


def test_pixels_count_not_how_they_lie_in_memory(tmp_path: Path) -> None:
    cache = ProposalCache(Grid(), tmp_path)
    assert cache.path(np.asfortranarray(picture())) == cache.path(picture())
    assert cache.path(picture()[:, ::-1]) == cache.path(picture()[:, ::-1].copy())


def test_no_proposals_are_kept_too(tmp_path: Path) -> None:
    cache = ProposalCache(Grid(darkest=255), tmp_path)
    assert [cache.get(picture(), "a")[1] for _ in range(2)] == ["computed", "cached"]
    assert cache.get(picture(), "a")[0].shape == (0, 4)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:50]),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(bytes(len(path.read_bytes()))),
        lambda path: path.write_bytes(path.read_bytes()[:-16]),
        lambda path: path.write_bytes(path.read_bytes()[:40] + b"!" + path.read_bytes()[41:]),
        lambda path: path.write_bytes(path.read_bytes() * 2),
    ],
)
def test_a_damaged_file_is_made_anew(tmp_path: Path, damage: object) -> None:
    cache = ProposalCache(Grid(), tmp_path)
    cache.get(picture(), "a")
    damage(cache.path(picture()))
    found, outcome = cache.get(picture(), "a")
    assert outcome == "broken"
    assert torch.equal(found, grid(20, 30))
    assert cache.get(picture(), "a")[1] == "cached"


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ProposalCache(Grid(), tmp_path)

    def interrupted(source: Path, target: Path) -> None:
        assert source.stat().st_size > 0
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.get(picture(), "a")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["source.txt"]


def test_threads_may_ask_for_the_same_image_at_once(tmp_path: Path) -> None:
    cache = ProposalCache(Grid(), tmp_path)
    images = [picture(seed=number % 5) for number in range(100)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda image: cache.get(image, "a"), images))
    assert all(torch.equal(found, grid(20, 30)) for found, _ in results)
    outcomes = Counter(outcome for _, outcome in results)
    assert outcomes["broken"] == 0
    assert 5 <= outcomes["computed"] <= 40
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 6


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match=r"file/.*cannot be written: Not a directory.*proposals\.cache"):
        ProposalCache(Grid(), tmp_path / "file")
    cache = ProposalCache(Grid(), tmp_path / "cache")
    folder = cache.path(picture()).parent
    folder.write_text("")
    with pytest.raises(WriteError, match=r"cannot be written: .*proposals\.cache"):
        cache.get(picture(), "a")


def test_a_folder_that_was_removed_in_the_meantime_is_made_again(tmp_path: Path) -> None:
    cache = ProposalCache(Grid(), tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")
    assert [cache.get(picture(), "a")[1] for _ in range(2)] == ["computed", "cached"]


def test_the_default_folder_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "detkit" / "proposals"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert default_folder() == Path("/home/someone/.cache/detkit/proposals")
