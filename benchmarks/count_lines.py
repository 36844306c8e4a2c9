"""`python -m benchmarks lines`: how many lines detkit has, comments, docstrings and blank lines included.

It puts two figures into docs/pages/developing.md: the core, one detector from file to boxes, and all but the zoo.
"""

import ast
import re
from collections.abc import Iterable
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "detkit"
CORE = ("structures.py", "boxes", "data", "backbones", "tasks/detection", "engine", "inference/predictor.py")
NOT_CORE = ("soft_nms", "fusion", "cuda")
"""Parts of the names of files in `boxes` that the core detectors do not use."""
CORE_HEADS = ("ssd", "yolox")


def core_files() -> list[Path]:
    """The files of one detector from file to boxes: SSD and YOLOX, and all modules of detkit.heads that they import."""
    files = {path for name in CORE for path in _python_files(PACKAGE / name)}
    boxes = PACKAGE / "boxes"
    optional = {path for path in _python_files(boxes) if any(part in path.stem for part in NOT_CORE)}
    return sorted((files - optional) | _with_imported_heads(PACKAGE / "heads" / f"{name}.py" for name in CORE_HEADS))


def files_without_zoo() -> list[Path]:
    """All files of detkit but those of the zoo."""
    return sorted(set(_python_files(PACKAGE)) - set(_python_files(PACKAGE / "zoo")))


def count(files: Iterable[Path]) -> int:
    """Lines of the files in total."""
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)


def rounded(lines: int) -> str:
    """Lines to the nearest hundred, as the documents give them: "12,300"."""
    return f"{round(lines, -2):,}"


def report() -> str:
    """Both figures, and the core by folders."""
    core = core_files()
    folders = sorted({path.relative_to(PACKAGE).parts[0] for path in core})
    parts = [(name, [path for path in core if path.relative_to(PACKAGE).parts[0] == name]) for name in folders]
    rows = [("core", core), *((f"  {name}", files) for name, files in parts), ("without zoo", files_without_zoo())]
    return "\n".join(f"{name:15} {count(files):7,} lines  {len(files):4} files" for name, files in rows)


def rewrite(page: Path) -> bool:
    """Put both figures into the table of a page, whose rows begin with their names; whether that changed it."""
    before = page.read_text(encoding="utf-8")
    after = before
    for name, files in (("core", core_files()), ("all of detkit", files_without_zoo())):
        after = re.sub(rf"^(\| {name}.*\| )[\d,]+ \|$", rf"\g<1>{rounded(count(files))} |", after, flags=re.MULTILINE)
    page.write_text(after, encoding="utf-8")
    return after != before


def _python_files(path: Path) -> list[Path]:
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]


def _with_imported_heads(files: Iterable[Path]) -> set[Path]:
    """The files, and the modules of detkit.heads that they import, directly or through one another."""
    found: set[Path] = set()
    waiting = list(files)
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        imports = (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        modules = {node.module for node in imports if isinstance(node, ast.ImportFrom) and node.module}
        names = (module.removeprefix("detkit.") for module in modules if module.startswith("detkit.heads."))
        waiting += [PACKAGE / f"{name.replace('.', '/')}.py" for name in names]
    return found
