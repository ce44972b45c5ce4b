"""The documentation is correct: commands parse, links lead to files, requirements are complete."""
import re
import shlex
import sys
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest

from tests.conftest import needs_pydensecrf
from tests.processes import Command, here

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
IMPORT_NAMES = {
    "PIL": "pillow", "cv2": "opencv-python-headless", "open_clip": "open_clip_torch",
    "pydensecrf": "pydensecrf2",
    "yaml": "pyyaml",
}  # fmt: skip


def commands(text: str) -> list[list[str]]:
    """Return the `python ...` command lines of a page or a script, split into words."""
    joined = re.sub(r"\\\n\s*", " ", text)
    lines = re.findall(r"^[ \t>$]*(?:torchrun [^\n]*?)?python3? ((?:-m )?[^\n]+)$", joined, re.MULTILINE)
    return [shlex.split(line) for line in lines if not line.startswith("-c")]


@cache
def help_of(script: str) -> str:
    """Return the output of `python <script> --help`."""
    code, output, errors = here(*script.split(), "--help")
    assert code == 0, errors
    return output


def scripts_and_flags() -> dict[str, set[str]]:
    """Return script -> all flags of its commands in the pages and in runs/*.sh."""
    flags: dict[str, set[str]] = {}
    for page in [*PAGES, *ROOT.glob("runs/*.sh")]:
        for words in commands(page.read_text()):
            script, rest = (" ".join(words[:2]), words[2:]) if words[0] == "-m" else (words[0], words[1:])
            if script.split()[-1] in ("pip", "venv", "pytest"):
                continue
            flags.setdefault(script, set()).update(word for word in rest if word.startswith("--"))
    return flags


FLAGS = scripts_and_flags()


def test_the_numbered_steps_are_documented():
    assert {"generate_cams_voc12.py", "generate_cams_coco14.py", "generate_cams.py", "eval_cam.py",
            "eval_cam_with_crf.py", "-m voc12.prepare", "-m coco14.prepare"} <= FLAGS.keys()  # fmt: skip


@pytest.mark.parametrize("script", sorted(FLAGS))
def test_every_documented_flag_exists(script):
    known = set(re.findall(r"--[a-z][a-z0-9_-]*", help_of(script)))
    assert FLAGS[script] <= known, FLAGS[script] - known


def test_modules_start_in_a_new_process():
    """A new process has none of the imports of earlier tests."""
    code, output = Command("-m", "deeplab.predict", "--help").end()
    assert code == 0 and output == help_of("-m deeplab.predict")


def test_every_option_of_step_1_is_documented():
    known = set(re.findall(r"--[a-z][a-z0-9_-]*", help_of("generate_cams.py"))) - {"--help"}
    page = (ROOT / "docs" / "cams.md").read_text()
    assert not {flag for flag in known if flag not in page}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


def test_each_decision_has_a_reason_and_an_existing_place():
    page = (ROOT / "docs" / "decisions.md").read_text()
    entries = re.findall(r"^\* .*(?:\n  .*)*", page, re.MULTILINE)
    assert len(entries) > 40
    for entry in entries:
        decision, reason, where = entry.splitlines()
        assert decision.endswith(".**") and reason.startswith("  Reason: "), entry
        files = re.findall(r"`(.*?)`", where.removeprefix("  Where: "))
        assert files and all((ROOT / file).is_file() for file in files), entry


def requirements() -> list[str]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return [match.group() for line in lines if (match := re.match(r"[A-Za-z0-9_-]+", line))]


@pytest.mark.parametrize("package", [
    pytest.param(name, marks=needs_pydensecrf if name == "pydensecrf2" else ()) for name in requirements()
])  # fmt: skip
def test_requirements_are_installed(package):
    assert metadata.version(package)


def test_every_imported_package_is_in_the_requirements():
    required = {name.lower().replace("_", "-") for name in requirements()}
    own = {path.name for path in ROOT.iterdir() if path.is_dir()}
    missing = set()
    for file in ROOT.glob("[a-z]*/**/*.py"):
        if "output" in file.parts:
            continue
        for name in re.findall(r"^\s*(?:from|import) ([A-Za-z_]\w*)", _code(file.read_text()), re.MULTILINE):
            package = IMPORT_NAMES.get(name, name).lower().replace("_", "-")
            if name not in sys.stdlib_module_names and name not in own and package not in required:
                missing.add(f"{file.relative_to(ROOT)}: {name}")
    assert not missing


def _code(text: str) -> str:
    """Return a module without its triple-quoted strings, whose lines may begin with "from"."""
    return re.sub(r'""".*?"""', "", text, flags=re.DOTALL)
