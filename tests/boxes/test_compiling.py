"""The cache of compiled kernels: damage costs time only."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
from detkit.boxes.kernels.compiling import cached

@cached("int64(int64)", nogil=True)
def twice(number):
    return 2 * number

@cached()
def thrice(number):
    return 3 * number

print(twice(21), thrice(14))
"""


def run(folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "kernels.py").write_text(CODE)
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(folder / "kernels.py")], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "42 42\n"
    return done


@pytest.mark.parametrize(("ending", "share"), [(".nbi", 0), (".nbi", 0.5), (".nbc", 0.5)])
def test_a_damaged_cache_is_compiled_anew(ending: str, share: float, tmp_path: Path) -> None:
    run(tmp_path)
    files = [path for path in (tmp_path / "cache").rglob("*") if path.suffix == ending]
    assert len(files) == 2
    for path in files:
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert "is damaged" in run(tmp_path).stderr
    assert "is damaged" not in run(tmp_path).stderr


def test_a_cache_that_cannot_be_written_does_not_matter(tmp_path: Path) -> None:
    run(tmp_path)
    cache = tmp_path / "cache"
    for path in sorted(cache.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    cache.rmdir()
    cache.symlink_to("/proc")  # where nobody can write
    run(tmp_path)
