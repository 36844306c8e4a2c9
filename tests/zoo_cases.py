"""Cases that the systems of the zoo add to tests of the core."""

import functools
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = Path(__file__).with_name("zoo")


def zoo_cases(kind: str) -> dict[str, Any]:
    """All entries of the dictionaries `kind` in the files tests/zoo/*/cases.py that are there.

    A system of the zoo is deleted with its folder of tests, and no test of the core names it.
    """
    return {
        name: case for path in sorted(FOLDER.glob("*/cases.py")) for name, case in getattr(load(path), kind, {}).items()
    }


@functools.cache
def load(path: Path) -> ModuleType:
    """The module in a file; all of them have the same name, so that they cannot be imported as usual."""
    spec = importlib.util.spec_from_file_location(f"cases_of_{path.parent.name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
