"""The scripts of runs/ print their usage, run the steps in order, and stop at the first error."""
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STUB = """#!/bin/bash
echo "$@" >> "$LOG"
[ "$1" != "$FAILS" ]
"""


def run(script, *arguments, **environment):
    command = ["bash", str(ROOT / "runs" / script), *map(str, arguments)]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)


@pytest.fixture
def steps(tmp_path):
    """Function (script, fails) -> exit code and commands of a script that runs with a stub of `python`."""
    stub, log, data = tmp_path / "bin" / "python", tmp_path / "log", tmp_path / "data"
    stub.parent.mkdir()
    stub.write_text(STUB)
    stub.chmod(0o755)
    for folder in ("JPEGImages/train2014", "SegmentationClass"):
        (data / folder).mkdir(parents=True)
    (data / "init.pth").touch()

    def call(script, fails=""):
        environment = {"PATH": f"{stub.parent}:{os.environ['PATH']}", "LOG": str(log), "FAILS": fails}
        done = run(script, data, tmp_path / "out", INIT=str(data / "init.pth"), **environment)
        commands = log.read_text().replace("-m ", "").splitlines()
        return done.returncode, [command.split()[0] for command in commands]

    return call


@pytest.mark.parametrize("script", ["voc12.sh", "coco14.sh"])
def test_scripts_print_their_usage(script, tmp_path):
    done = run(script)
    assert done.returncode == 2 and f"Usage: bash runs/{script}" in done.stderr
    done = run(script, tmp_path / "nowhere")
    assert done.returncode == 2 and "nowhere/JPEGImages" in done.stderr and "does not exist" in done.stderr


@pytest.mark.parametrize("name", ["voc12", "coco14"])
def test_scripts_run_the_numbered_steps(name, steps):
    assert steps(f"{name}.sh") == (0, [
        f"{name}.prepare", f"generate_cams_{name}.py", "eval_cam.py", "eval_cam_with_crf.py",
        "eval_cam_with_crf.py", "deeplab.train", "deeplab.test",
    ])  # fmt: skip


def test_scripts_stop_at_the_first_error(steps):
    code, commands = steps("voc12.sh", fails="eval_cam.py")
    assert code != 0 and commands[-1] == "eval_cam.py"


@pytest.mark.parametrize("script", sorted((ROOT / "runs").glob("*.sh")), ids=lambda file: file.name)
def test_scripts_have_valid_syntax(script):
    subprocess.run(["bash", "-n", script], check=True)
