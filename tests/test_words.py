"""The words of the code and the documents: plain technical English, in the field's terms."""

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOT_YET = (
    "README.md",
    "detkit/cli",
    "detkit/heads",
    "detkit/inference",
    "detkit/model.py",
    "detkit/tasks",
    "detkit/zoo",
    "docs",
)
"""Files and folders that are still to be rewritten."""
REPLACED = {
    "pictures?": "image",
    "films?": "video",
    "truths?": "ground truth; targets in code",
    "ground truths": "targets, ground-truth boxes",
    "mend(s|ed|ing)?": "fix",
    "can(not)? be had": "is (not) available",
    "ha(s|ve) no use for": "does not apply to",
    "all in all": "in total",
    "be it": "even if",
    "not asked for": "not requested",
    "(is|are) none of": "is not one of",
    "is no(?! (longer|more)) [a-z]+": "is not a valid ...",
    "(that|this|which) is what": "a direct statement",
    "stands? (twice|together|beside|behind)": "is listed, is next to",
    "however (small|large|many|long|few)": "regardless of",
    "without a word": "silently",
    "anew": "again",
    "to the bit": "bit-identical",
    "goes? on (from|with)": "continues",
}
"""Words and phrases, as regular expressions of whole words, and what to write instead."""
NAMES = ("Behind", "forget_children", "forget_outside", "ignored_truths", "promising", "spoken", "truth_index")
"""Names that were replaced."""
CORRECT = ("ground truth", "ground-truth", "there is no")
"""Phrases in which a word of REPLACED is right."""
OLD_OPTIONS = (("detkit/config.py", "picture"), ("detkit/config.py", "pictures"))
"""Words in files that must contain them, since old configs do."""


def whole_words(phrases: Iterable[str]) -> str:
    """A regular expression of any of the phrases, which may run over the end of a line of code or comment."""
    return "|".join(rf"\b(?:{phrase})\b".replace(" ", r"[\s#]+") for phrase in phrases)


PATTERN = re.compile(
    f"(?P<replaced>{whole_words([*REPLACED, *NAMES])})|{whole_words(CORRECT)}",
    re.IGNORECASE,
)
SUFFIXES = frozenset({".py", ".md", ".yaml"})


def texts() -> list[Path]:
    """The files whose words are checked."""
    folders = [path for name in ("detkit", "docs", "configs") for path in sorted((ROOT / name).rglob("*"))]
    files = [path for path in [*folders, ROOT / "README.md"] if path.suffix in SUFFIXES and path.is_file()]
    waiting = [ROOT / name for name in NOT_YET]
    return [path for path in files if not any(path == other or other in path.parents for other in waiting)]


def replaced_words(path: Path) -> Iterator[str]:
    """The replaced words in a file, with their lines."""
    text, name = path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()
    for found in PATTERN.finditer(text):
        word = found["replaced"]
        if word and (name, word) not in OLD_OPTIONS:
            yield f"{name}:{text.count(chr(10), 0, found.start()) + 1}: {' '.join(word.split())!r}"


def what_docstrings(path: Path) -> Iterator[str]:
    """The docstrings that begin with "What"."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.Expr)):
        value = node.value.value if isinstance(node.value, ast.Constant) else None
        if isinstance(value, str) and re.match(r"\s*What\b", value):
            yield f"{path.relative_to(ROOT)}:{node.lineno}: docstring begins with 'What'"


def test_words_of_the_field() -> None:
    faults = [fault for path in texts() for fault in replaced_words(path)]
    assert not faults, "\n".join(["Replaced words, see REPLACED in this file:", *faults])


def test_docstrings_begin_with_the_imperative_or_a_noun() -> None:
    faults = [fault for path in texts() if path.suffix == ".py" for fault in what_docstrings(path)]
    assert not faults, "\n".join(faults)


def test_parts_that_wait_exist() -> None:
    assert [name for name in NOT_YET if not (ROOT / name).exists()] == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a picture", True),
        ("the ground truth", False),
        ("ground-truth boxes", False),
        ("the truth", True),
        ("it cannot\n    # be had", True),
        ("is no longer", False),
        ("is no image", True),
    ],
)
def test_the_pattern(text: str, found: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "a.py").write_text(text, encoding="utf-8")
    assert bool(list(replaced_words(tmp_path / "a.py"))) is found
