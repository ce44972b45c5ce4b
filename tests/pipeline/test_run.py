"""Runs: the check of recorded settings, the list of failures, and several processes."""

import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foundation import logs
from foundation.files import replacing
from pipeline.processes import Outcome, device_of, part_of
from pipeline.run import Record, Run, command, read_settings, write_failures, write_json
from pipeline.step import Decoded, Step
from segmentation.distributed import WorkFailed

ROOT = Path(__file__).parents[2]
NAMES = [str(number) for number in range(11)]


class Sum(Step):
    """Sums its names; `trouble` selects a fault."""

    def __init__(self, factor: int, trouble: str = ""):
        self.factor, self.trouble, self.total = factor, trouble, 0

    def start(self, worker_index):
        if self.trouble == "bad model":
            raise FileNotFoundError("model x.pt does not exist")
        if self.trouble == "worker bug":
            raise KeyError("model")

    def decode(self, name):
        if name == "7" and self.trouble == "bad image":
            raise ValueError("image 7 is\nbroken")
        return Decoded(name)

    def compute(self, batch):
        (decoded,) = batch
        if decoded.name == "7" and self.trouble == "bug":
            raise KeyError("seven")
        if decoded.name == "7" and self.trouble == "killed":
            os.kill(os.getpid(), 9)
        return [int(decoded.name) * self.factor]

    def write(self, decoded, result):
        self.total += result
        return ["odd"] if int(decoded.name) % 2 else None

    def finish(self):
        return self.total


@given(st.lists(st.integers(), max_size=40), st.integers(1, 12))
def test_parts_are_a_partition(items, world):
    parts = [part_of(items, rank, world) for rank in range(world)]
    assert sorted(item for part in parts for item in part) == sorted(items)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("num_workers", [1, 3])
def test_results_are_returned_and_notes_printed(tmp_path, capfd, num_workers):
    run = Run(tmp_path / "out")
    assert sum(run.map(Sum(2), NAMES, num_workers=num_workers)) == 110
    assert run.finish() == 0
    message = capfd.readouterr().err
    assert "11 images, 0 failed" in message and "odd: 5 (1, 3, 5, 7, 9)" in message
    assert "image/s" not in message  # no progress bar without a terminal
    assert not (tmp_path / "out" / "failed.txt").exists()


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_failed_image_is_listed_until_a_rerun_succeeds(tmp_path, capsys, num_workers):
    run = Run(tmp_path)
    assert sum(run.map(Sum(1, "bad image"), NAMES, num_workers=num_workers)) == 55 - 7
    assert run.finish() == 1
    assert (tmp_path / "failed.txt").read_text() == "7\timage 7 is broken\n"
    assert "failed: 7: image 7 is broken" in capsys.readouterr().err
    run = Run(tmp_path)
    run.map(Sum(1, "bug"), NAMES)
    assert run.finish() == 1 and run.failures == [("7", "KeyError: 'seven'")]
    run = Run(tmp_path)
    run.map(Sum(1), ["7"])
    assert run.finish() == 0 and not (tmp_path / "failed.txt").exists()


@pytest.mark.parametrize(
    "trouble, error, match",
    [
        ("killed", ChildProcessError, "died .exit code -9"),
        ("bad model", OSError, r"x\.pt does not exist"),
        ("worker bug", ChildProcessError, "KeyError: 'model'"),
    ],
)
def test_a_process_that_fails_fails_the_run(trouble, error, match):
    with pytest.raises(error, match=match):
        Run(None).map(Sum(1, trouble), NAMES, num_workers=2)


def test_a_run_without_images_succeeds():
    run = Run(None)
    assert run.map(Sum(1), [], num_workers=4) == [0] and run.finish() == 0


def test_a_folder_of_other_settings_is_refused(tmp_path):
    folder = tmp_path / "cams"
    settings = {"benchmark": "voc12", "scales": (1.0,), "flip": False}
    first = Record(settings=settings, inputs={"model": "abc"}, outputs=("*.npy",))
    Run(folder, first)
    record = read_settings(folder)
    assert record["settings"]["benchmark"] == "voc12" and record["inputs"] == {"model": "abc"}
    assert {"python", "numpy", "torch"} <= set(record["versions"])
    (folder / "a.npy").touch()
    (folder / "note.txt").touch()
    Run(folder, first)  # the same again
    assert (folder / "a.npy").exists()
    other = replace(first, settings={**settings, "flip": True}, inputs={"model": "abd"})
    with pytest.raises(ValueError, match=r"flip \(was False, now True\), model \(was 'abc', now 'abd'\)"):
        Run(folder, other)
    Run(folder, other, overwrite=True)
    assert not (folder / "a.npy").exists() and (folder / "note.txt").exists()
    assert read_settings(folder)["settings"]["flip"] is True


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_unknown_origin_is_refused(tmp_path, overwrite):
    (tmp_path / "truth.png").touch()
    with pytest.raises(ValueError, match=r"contains truth\.png but no settings\.json, so this command did"):
        Run(tmp_path, Record(outputs=("*.png",)), overwrite)
    assert [file.name for file in tmp_path.iterdir()] == ["truth.png"]


def test_a_folder_of_another_step_is_refused(tmp_path):
    Run(tmp_path, Record("cams", {"a": 1}, outputs=("*.npy",)))
    (tmp_path / "truth.png").touch()
    before = (tmp_path / "settings.json").read_bytes()
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"contains the outputs of step cams, not of masks"):
            Run(tmp_path, Record("masks", {"a": 1}, outputs=("*.png",)), overwrite)
    assert (tmp_path / "truth.png").exists() and (tmp_path / "settings.json").read_bytes() == before


def test_overwrite_removes_nothing_from_subfolders(tmp_path):
    first = Record("masks", {"a": 1}, outputs=("*.png",))
    other = replace(first, settings={"a": 2})
    Run(tmp_path, first)
    (tmp_path / "mine").mkdir()
    files = [tmp_path / "a.png", tmp_path / "mine" / "b.png"]
    for file in files:
        file.touch()
    with pytest.raises(ValueError, match=r"also contains mine.b\.png, but --overwrite removes nothing"):
        Run(tmp_path, other, overwrite=True)
    assert all(file.exists() for file in files)
    with pytest.raises(ValueError, match=r"other settings: a \(was 1, now 2\)"):
        Run(tmp_path, other)
    files[1].unlink()
    Run(tmp_path, other, overwrite=True)
    assert not files[0].exists()


def test_settings_of_a_run_without_outputs_are_replaced(tmp_path):
    Run(tmp_path, Record("", {"a": 1}, {"model": "wrong"}, ("*.npy",)))
    (tmp_path / "failed.txt").touch()
    Run(tmp_path, Record("", {"a": 2}, {"model": "right"}, ("*.npy",)))
    assert read_settings(tmp_path)["settings"] == {"a": 2}


def test_temporary_files_of_a_killed_run_are_removed(tmp_path):
    Run(tmp_path)
    (settings,) = tmp_path.iterdir()
    with replacing(tmp_path / "a.npy"):
        (left,) = set(tmp_path.iterdir()) - {settings}
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    left = left.with_name(left.name.replace(str(os.getpid()), str(process.pid)))
    left.touch()
    Run(tmp_path)
    assert not left.exists() and (tmp_path / "a.npy").exists()


class Files(Step):
    """Writes a file for each name; after the name "5" it calls `fault`."""

    def __init__(self, folder: Path, fault):
        self.folder, self.fault = folder, fault

    def is_done(self, name):
        return (self.folder / f"{name}.npy").exists()

    def decode(self, name):
        return Decoded(name)

    def compute(self, batch):
        return batch

    def write(self, decoded, result):
        with replacing(self.folder / f"{decoded.name}.npy"):
            pass
        if decoded.name == "5":
            self.fault()


def rename(folder: Path) -> None:
    folder.rename(folder.with_name("gone"))


def empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink(missing_ok=True)


@pytest.mark.parametrize("remove, num_workers", [(shutil.rmtree, 1), (empty, 1), (rename, 1), (rename, 2)])
def test_run_whose_folder_is_removed_fails_and_continues(tmp_path, remove, num_workers):
    folder, kept = tmp_path / "out", tmp_path / "kept"
    record = Record("masks", {"a": (1, 2)}, {"model": "abc"}, ("*.npy",))
    for fault in (partial(remove, folder), int):
        run = Run(folder, record, further={kept: replace(record, step="cams")})
        run.map(Files(folder, fault), NAMES, num_workers)
        if fault is not int:
            with pytest.raises(WorkFailed, match="out was removed or emptied during the run, and files"):
                run.finish()
            assert len(list(folder.glob("*.npy"))) < len(NAMES)
    assert run.finish() == 0 and len(list(folder.glob("*.npy"))) == len(NAMES)
    assert read_settings(folder)["settings"] == {"a": [1, 2]} and read_settings(kept)["step"] == "cams"


def test_record_of_a_removed_folder_is_restored_before_the_run_ends(tmp_path):
    """So that the same command continues even if the run is killed."""
    run = Run(tmp_path / "out", Record("masks", {"a": 1}), further={tmp_path / "cams": Record("cams")})
    before = [read_settings(tmp_path / name) for name in ("out", "cams")]
    for name in ("out", "cams"):
        shutil.rmtree(tmp_path / name)
    run.take(Outcome("x"))
    assert [read_settings(tmp_path / name) for name in ("out", "cams")] == before


def test_run_whose_folder_another_run_has_filled_fails(tmp_path):
    run = Run(tmp_path, Record("masks", {"a": 1}))
    Run(tmp_path, Record("masks", {"a": 2}))
    with pytest.raises(WorkFailed, match="another run with other settings filled"):
        run.finish()
    runs = [Run(tmp_path, Record("masks", {"a": 1.0, "b": (2,)})) for _ in range(2)]
    assert [run.finish() for run in runs] == [0, 0]  # the same settings


def test_output_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(ValueError, match="out is a file: give a folder"):
        Run(tmp_path / "out")


def test_names_that_cannot_be_encoded_are_listed_with_escapes(tmp_path):
    write_failures(tmp_path / "failed.txt", [("caf\udce9", "no image caf\udce9")])
    assert (tmp_path / "failed.txt").read_text() == "caf\\udce9\tno image caf\\udce9\n"
    write_json(tmp_path / "a.json", {"caf\udce9": 1})
    assert json.loads((tmp_path / "a.json").read_text()) == {"caf\udce9": 1}


@pytest.mark.parametrize("text", ['{"settings": {', "[1]", "3", '{"settings": 3}', '{"inputs": [1]}', "\xff",
    '{"step": []}', '{"settings": {"a": NaN}}', '{"settings": {"a": 1e999}}', "{\"info\": " + "[" * 100_000,
    '{"settings": {"a": ' + "[" * 100 + "]" * 100 + "}}", '{"settings": {"a": 1, "a": 2}}'])  # fmt: skip
def test_damaged_settings_raise(tmp_path, text):
    (tmp_path / "settings.json").write_text(text, encoding="latin1")
    with pytest.raises(ValueError, match=r"settings\.json is damaged \(.*\): restore it") as error:
        Run(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "error, code, message",
    [
        (None, 0, ""),
        (ValueError("bad flag"), 2, "error: bad flag"),
        (FileNotFoundError("no file"), 2, "error: no file"),
        (ChildProcessError("died"), 1, "error: died"),
        (KeyboardInterrupt(), 130, "the same command continues"),
    ],
)
def test_command(error, code, message, capsys):
    def main():
        if error:
            raise error

    with pytest.raises(SystemExit) as end:
        command(main)
    assert end.value.code == code
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err


def test_command_returns_the_code_of_main_and_logs_tracebacks_at_debug_level(capsys):
    with pytest.raises(SystemExit) as end:
        command(lambda: 1)
    assert end.value.code == 1
    logs.show(logging.DEBUG)
    with pytest.raises(SystemExit):
        command(lambda: int("x"))
    assert "Traceback" in capsys.readouterr().err


def test_notes_keep_only_a_few_names(capsys):
    run = Run(None)
    for number in reversed(range(1000)):
        run.take(Outcome(f"{number:04d}", notes=("odd",)))
    count, names = run.notes["odd"]
    assert count == 1000 and len(names) <= 10
    run.finish()
    assert "odd: 1000 (0000, 0001, 0002, 0003, 0004, ...)" in capsys.readouterr().err


def test_device_of_each_process(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert [device_of("auto", index) for index in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert device_of("cpu", 1) == "cpu" and device_of("cuda:1", 0) == "cuda:1"
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert device_of("auto", 3) == "cpu"
    with pytest.raises(ValueError, match=r"does not exist: torch detects 0 GPUs; use cpu"):
        device_of("cuda")


SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from pipeline.run import Record, Run, command
from tests.pipeline.test_run import NAMES, Sum
def main():
    run = Run({folder!r}, Record(settings={{"a": 1}}))
    results = run.map(Sum(1, "bad image"), NAMES)
    print("rank", run.rank, len(results), sum(results))
    return run.finish()
if __name__ == "__main__":
    command(main)
"""


def test_ranks_of_torchrun_divide_the_images(tmp_path):
    script = tmp_path / "step.py"
    script.write_text(SCRIPT.format(root=str(ROOT), folder=str(tmp_path / "out")))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    ranks = []
    for rank in ("0", "1"):  # the environment of torchrun's processes
        environment = {**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"}
        command_line = [sys.executable, str(script)]
        pipe = subprocess.PIPE
        ranks.append(subprocess.Popen(command_line, env=environment, stdout=pipe, stderr=pipe, text=True))
    outputs = [process.communicate(timeout=120) for process in ranks]
    assert [process.returncode for process in ranks] == [1, 1], outputs
    assert [out for out, _ in outputs] == ["rank 0 2 48\n", "rank 1 2 48\n"]
    assert "11 images, 1 failed" in outputs[0][1] and "failed" not in outputs[1][1]
    assert (tmp_path / "out" / "failed.txt").read_text() == "7\timage 7 is broken\n"
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["settings"] == {"a": 1}


class Slow(Step):
    """Creates a file named after the process id for each name."""

    def __init__(self, folder: str):
        self.folder = folder

    def decode(self, name):
        return Decoded(name)

    def compute(self, batch):
        return [decoded.name for decoded in batch]

    def write(self, decoded, name):
        (Path(self.folder) / f"{name}_{os.getpid()}").touch()
        time.sleep(0.2)


def test_children_of_a_killed_run_end(tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pipeline.run import Run
from tests.pipeline.test_run import NAMES, Slow
Run(None).map(Slow({str(tmp_path)!r}), NAMES * 50, num_workers=2)
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while len(children := {int(file.name.split("_")[1]) for file in tmp_path.iterdir()}) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.kill()
    process.wait()
    while any(_runs(child) for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
        return "Z" not in Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return False
