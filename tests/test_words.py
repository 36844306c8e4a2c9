"""The words of the text: plain technical English in the terms of the field."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WORDS = re.compile(
    r"\b(pictures?|films?|mend(s|ed|ing)?|cannot be had|can be had|to be had|has no use|have no use|had no use"
    r"|all in all|not asked for|be it|behind it all)\b|(?<!ground )(?<!ground-)(?<!ground_)\btruths?\b",
    re.IGNORECASE,
)
FILES = [
    *ROOT.glob("detkit/**/*.py"),
    *ROOT.glob("docs/**/*.md"),
    *ROOT.glob("configs/*.yaml"),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
]
OLD_NAMES = {"detkit/config.py"}
"""Files that hold the old names of options, which keep loading."""


def lines(path: Path) -> Iterator[tuple[int, str]]:
    return enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_words_of_the_field(path: Path) -> None:
    if path.relative_to(ROOT).as_posix() in OLD_NAMES:
        return
    found = [f"{path.relative_to(ROOT)}:{number}: {line.strip()}" for number, line in lines(path) if WORDS.search(line)]
    assert not found, "\n".join(found)


def test_docstrings_begin_with_what_a_thing_is_or_does() -> None:
    found = []
    for path in ROOT.glob("detkit/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node) or ""
                if text.startswith("What "):
                    found.append(f"{path.relative_to(ROOT)}: {text.splitlines()[0]}")
    assert not found, "\n".join(found)
