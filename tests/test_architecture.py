"""Rules of the architecture, held by tests."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "detkit"

# Imports run one way: a module may import from layers before its own, and from its own.
LAYERS = [
    {"errors"},
    {"io", "schema"},
    {"structures", "registry", "config"},
    {"boxes"},
    {"data", "backbones"},
    {"necks"},
    {"heads"},
    {"published"},
    {"model"},
    {"tasks"},
    {"inference"},
    {"engine"},
    {"cli"},
    {"zoo"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def module_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imported_names(path: Path) -> set[str]:
    """Full names of the modules that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} if node.module != "detkit" else {f"detkit.{alias.name}" for alias in node.names}
    return found


def imported_modules(path: Path) -> set[str]:
    """First-level modules of detkit that a file imports, anywhere in it."""
    return {name.split(".")[1] for name in imported_names(path) if name.startswith("detkit.")}


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    level = LEVEL[module_of(path)]
    for name in imported_modules(path) - {"__version__"}:
        assert LEVEL[name] <= level, f"{path.name} imports detkit.{name}, which stands above it"


def test_layers_name_every_module_and_no_other() -> None:
    assert set(LEVEL) == {module_of(path) for path in FILES}


def test_the_package_does_not_import_the_benchmarks() -> None:
    importers = [path for path in FILES if any(name.split(".")[0] == "benchmarks" for name in imported_names(path))]
    assert importers == []


def test_one_module_opens_images() -> None:
    """Elsewhere neither the allow-list of decoders nor the limit of memory would hold."""
    openers = re.compile(r"Image\.open\(|Image\.OPEN|imread|imdecode|imageio|torchvision\.io")
    found = [path.relative_to(PACKAGE).as_posix() for path in FILES if openers.search(path.read_text(encoding="utf-8"))]
    assert found == ["data/image.py"]


@pytest.mark.parametrize(
    ("statement", "arguments"),
    [("import detkit", []), ("from detkit.cli import main; main(['--help'])", [])],
)
def test_start_is_light(statement: str, arguments: list[str]) -> None:
    """Nothing heavy is imported for `import detkit` and `detkit --help`; that is what keeps them fast."""
    heavy = ["torch", "torchvision", "timm", "albumentations", "cv2", "numba", "matplotlib", "supervision", "numpy"]
    code = f"{statement}\nimport sys\nprint('loaded:', [name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip().endswith("loaded: []")


def test_parts_that_a_model_does_not_use_import_nothing_heavy() -> None:
    """Of these torchvision alone would take as long as torch; the others are for training and drawing."""
    heavy = ["torchvision", "timm", "albumentations", "matplotlib", "supervision", "numba", "lightning_fabric"]
    code = (
        "import sys, detkit.inference.images\nfrom detkit.registry import backbones, heads, necks, tasks\n"
        "names = [registry.names() for registry in (backbones, heads, necks, tasks)]\n"
        f"print('loaded:', [name for name in {heavy} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip().endswith("loaded: []")


def test_registering_a_name_twice_is_refused() -> None:
    from detkit.registry import Registry

    registry = Registry("part", "detkit.heads")
    registry.register("a")(dict)
    with pytest.raises(ValueError, match="part 'a' is already registered"):
        registry.register("a")(list)
