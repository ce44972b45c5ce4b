"""docs/paper_map.md: every function that it names exists, in the file that it links."""

import inspect
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "paper_map.md"
TEXT = PAGE.read_text()
LINKED = re.findall(r"\[`([\w.]+)`\]\(([^)#]+)\)", TEXT)
PACKAGES = {file.parent.name for file in ROOT.glob("*/__init__.py")}
NAMED = {name for name in re.findall(r"`([a-z]\w*(?:\.\w+)+)`", TEXT) if name.split(".")[0] in PACKAGES}


def module_and_attributes(name: str) -> tuple[ModuleType, list[str]]:
    """Return the module at the start of a dotted name, and the attributes after it."""
    first, *attributes = name.split(".")
    module = import_module(first)
    while attributes and hasattr(module, "__path__") and find_spec(f"{module.__name__}.{attributes[0]}"):
        module = import_module(f"{module.__name__}.{attributes.pop(0)}")
    return module, attributes


def test_page_has_a_table_for_each_paper():
    for heading in ("CLIP-ES", "TagCLIP", "DeepLab"):
        section = TEXT.split(f"\n## {heading}\n")[1].split("\n## ")[0]
        assert re.search(r"\[`[\w.]+`\]\(", section), f"no function in the section {heading}"


def test_every_named_function_is_linked():
    assert NAMED and {name for name, _ in LINKED} == NAMED


@pytest.mark.parametrize("name, target", sorted(set(LINKED)))
def test_function_exists_in_the_linked_file(name, target):
    module, attributes = module_and_attributes(name)
    assert attributes, f"{name} is a module, not a function"
    assert Path(module.__file__).resolve() == (PAGE.parent / target).resolve()
    value = module
    for attribute in attributes:
        value = getattr(value, attribute)
    if inspect.isfunction(value) or inspect.isclass(value):
        assert value.__module__ == module.__name__, f"{name} is defined in {value.__module__}"


def test_every_link_target_exists():
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", TEXT)
    assert targets and not [target for target in targets if not (PAGE.parent / target).exists()]
