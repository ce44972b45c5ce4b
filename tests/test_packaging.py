"""pyproject.toml and requirements.txt name the same packages."""
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_requirements_are_the_dependencies_and_extras():
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    text = (ROOT / "pyproject.toml").read_text()
    project = text[text.index("dependencies = [") : text.index("[tool.setuptools]")]
    declared = re.findall(r'"([A-Za-z][\w.-]*>=[\w.]+)"', project)
    assert sorted(filter(None, lines)) == sorted(declared)


def test_every_package_is_installed():
    folders = {file.parent.name for file in ROOT.glob("*/__init__.py")} - {"tests", "bench"}
    text = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"include = \[(.*?)\]", text, re.DOTALL)[1]
    assert folders <= {name.rstrip("*") for name in re.findall(r'"([\w*]+)"', listed)}
