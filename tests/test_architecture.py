"""The levels of docs/architecture.md: a package imports only from lower levels or from itself."""
import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEVELS = {
    "foundation": 0,
    "clip": 1,
    "segmentation": 1,
    "refinement": 1,
    "pytorch_grad_cam": 2,
    "voc12": 2,
    "coco14": 2,
    "shapes": 2,
    "cocostuff": 3,
    "pipeline": 3,
    "training": 4,
    "deeplab": 5,
    "tagclip": 5,
    "bench": 6,
    "clip_wsss": 6,
}


def imports(file: Path) -> set[str]:
    """Return the top-level names of the packages that a module imports."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", LEVELS)
def test_imports_point_downwards(package):
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        for name in imports(file) & LEVELS.keys() - {package}:
            assert LEVELS[name] < LEVELS[package], f"{file.relative_to(ROOT)} imports {name}"


def test_every_package_has_a_level():
    packages = {folder.parent.name for folder in ROOT.glob("*/__init__.py")} - {"tests"}
    assert packages == LEVELS.keys()


def test_nothing_imports_a_script():
    scripts = {file.stem for file in ROOT.glob("*.py")}
    for package in LEVELS:
        for file in (ROOT / package).rglob("*.py"):
            assert not imports(file) & scripts


def test_there_are_no_import_cycles():
    """This includes imports within functions."""
    modules = {}
    for file in [*ROOT.glob("*.py"), *(file for name in LEVELS for file in (ROOT / name).rglob("*.py"))]:
        parts = file.relative_to(ROOT).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    graph = {}
    for module, file in modules.items():
        names = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:  # `from package import module` depends only on the module
                    submodule = f"{node.module}.{alias.name}"
                    names.add(submodule if submodule in modules else node.module)
        graph[module] = names & modules.keys() - {module}
    TopologicalSorter(graph).prepare()  # raises CycleError, which lists the cycle
