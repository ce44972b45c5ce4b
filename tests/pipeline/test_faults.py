"""Faults while a step runs: killed processes, a full disk, damaged and unusual images, Ctrl-C."""

import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import shapes
from foundation import files
from pipeline.run import Run, command
from pipeline.step import Decoded, Step
from segmentation import camfile
from segmentation.distributed import gather
from segmentation.masks import read_mask
from tests.camfiles import write_cams
from tests.conftest import parity_image
from tests.processes import ROOT, Process, Started, ranks, torchrun
from tests.processes import script as run_script

IMAGES = 80
ATTEMPTS = 15  # maximum number of attempts to hit a run before it finishes
LOST = "error: another process of torchrun died: run the command again to continue\n"
linux = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="reads /proc")

YAML = """name: faults
classes: [circle, square, triangle, star]
backgrounds: [grass, sky]
templates: ['a photo of a {{}}.']
labels: file
root: {root}
image_dir: images
mask_dir: truth
split_file: {root}/split.txt
model: {model}
"""


def write_world(root: Path, names: list[str], size: tuple[int, int] = (60, 80)) -> Path:
    """Write a benchmark of coarse JPEGs and return its YAML file."""
    (root / "images").mkdir(parents=True)
    for index, name in enumerate(names):
        small = parity_image(f"faults_{index}", (4, 5))
        small.resize(size[::-1], Image.Resampling.NEAREST).save(root / "images" / f"{name}.jpg")
    (root / "split.txt").write_text("".join(f"{name} {i % 2} {2 + i % 2}\n" for i, name in enumerate(names)))
    (root / "faults.yaml").write_text(YAML.format(root=root, model=shapes.BENCHMARK.model))
    return root / "faults.yaml"


def flags_of(benchmark: Path) -> list[str]:
    return ["--benchmark", str(benchmark), "--device", "cpu"]


def run_here(script: str, capsys, monkeypatch, *flags) -> tuple[int, str]:
    """Run a script in this process; return its exit code and stderr."""
    main = import_module(script).main
    monkeypatch.setattr(sys, "argv", ["script", *map(str, flags)])
    with pytest.raises(SystemExit) as end:
        command(main)
    return end.value.code, capsys.readouterr().err


def contents(folder: Path, pattern: str = "*.png") -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob(pattern)}


# Killed and interrupted


def opened(process: int, folder: Path) -> bool:
    """Return whether the process has an open file in the folder."""
    try:
        open_files = [os.readlink(file) for file in Path(f"/proc/{process}/fd").iterdir()]
    except OSError:
        return False
    return any(file.startswith(str(folder)) for file in open_files)


def ended(run: Started) -> tuple[int, str]:
    """Wait for a run; return its exit code and output. All processes that it started must have ended."""
    code, output, *_ = run.end()
    run.gone()
    return code, output


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("faults")
    return write_world(root, [f"image_{number:03}" for number in range(IMAGES)])


def count(out: Path) -> int:
    return len(list(out.glob("image_*.np?")) or list(out.glob("image_*.png")))


def made(world: Path, script: str, out: Path) -> list:
    """Return the command that makes masks or CAMs of the world in `out`."""
    return [script, *flags_of(world), "--output", out]


@pytest.fixture(scope="module")
def uninterrupted(world, tmp_path_factory) -> Callable[[str], dict[str, bytes]]:
    """Function script -> files of a run without faults."""
    files_of = {}

    def of(script: str) -> dict[str, bytes]:
        if script not in files_of:
            out = tmp_path_factory.mktemp("uninterrupted")
            assert Process(run_script, *made(world, script, out)).end()[0] == 0
            files_of[script] = contents(out, "image_*")
            assert len(files_of[script]) == IMAGES
        return files_of[script]

    return of


def only_whole(out: Path, expected: dict[str, bytes]) -> int:
    """Assert that all existing files are complete and correct; return their number."""
    existing = contents(out, "image_*")
    existing = {name: content for name, content in existing.items() if not name.endswith(".tmp")}
    assert existing.items() <= expected.items()
    return len(existing)


@linux
def test_a_killed_rank_ends_the_run_and_a_rerun_completes_it(world, uninterrupted, tmp_path):
    expected, out = uninterrupted("generate_cams.py"), tmp_path / "out"
    for _ in range(ATTEMPTS):
        run = torchrun(ROOT / "generate_cams.py", *made(world, "generate_cams.py", out)[1:])
        run.until(lambda started=run: started.find("generate_cams.py", "\nRANK=0\n"))
        rank = run.find("generate_cams.py", "\nRANK=0\n")
        run.until(lambda: count(out) >= 4)
        with suppress(ProcessLookupError):
            os.kill(rank, signal.SIGKILL)
        code, output = ended(run)
        if count(out) < len(expected):
            break
        shutil.rmtree(out)  # finished before the signal: start again
    assert code == 1 and "Signal 9 (SIGKILL) received" in output
    assert 4 <= only_whole(out, expected) < len(expected)
    again = ranks(run_script, *made(world, "generate_cams.py", out))
    assert [ended(rank)[0] for rank in again] == [0, 0]
    assert contents(out, "image_*") == expected


FAULTS = [  # flags, target of the signal, signal, exit code, message
    ("ranks", "main", signal.SIGKILL, -signal.SIGKILL, ""),
    (["--decode_workers", "2"], "main", signal.SIGKILL, -signal.SIGKILL, ""),
    (["--num_workers", "2"], "spawn_main", signal.SIGKILL, 1, "a worker process died (exit code -9"),
    (["--threads", "2"], "group", signal.SIGINT, 130, "interrupted: the same command continues"),
    (["--decode_workers", "2"], "group", signal.SIGINT, 130, "interrupted: the same command continues"),
]


@linux
def test_masks_survive_successive_faults(world, uninterrupted, tmp_path, capsys, monkeypatch):
    """All faults hit the same folder. After each, all existing masks are correct; at the end all exist."""
    expected, out = uninterrupted("pseudo_masks.py"), tmp_path / "masks"
    start = made(world, "pseudo_masks.py", out)
    for flags, target, sent, exit_code, sentence in FAULTS:
        for _ in range(ATTEMPTS):
            before = count(out)
            runs = ranks(run_script, *start) if flags == "ranks" else [Process(run_script, *start, *flags)]
            run = runs.pop()
            run.reaches(lambda least=before + 3: count(out) >= least)
            if target == "group":
                run.signal_group(sent)
            elif target == "main":
                run.signal(sent)
            elif process := run.find(target):
                with suppress(ProcessLookupError):
                    os.kill(process, sent)
            for other in runs:
                other.signal(signal.SIGTERM)  # torchrun also ends the other ranks when one is lost
                assert ended(other)[0] in (-signal.SIGTERM, 0)
            code, output = ended(run)
            if code != 0 and count(out) < len(expected):
                break
            for file in sorted(out.glob("image_*.png"))[IMAGES // 4 :]:
                file.unlink()  # finished before the signal: repeat this fault
        assert code == exit_code and sentence in output and "Traceback" not in output, output
        if sent == signal.SIGINT:
            assert len(output.splitlines()) == 1, output
        assert before + 3 <= only_whole(out, expected) < len(expected)
    assert run_here("pseudo_masks", capsys, monkeypatch, *start[1:])[0] == 0
    assert contents(out, "image_*") == expected
    assert {file.name for file in out.iterdir()} == {*expected, "settings.json"}


@linux
def test_a_killed_rank_ends_an_evaluation(tmp_path, capsys, monkeypatch):
    cams, truth = tmp_path / "cams", tmp_path / "truth"
    truth.mkdir()
    grid = np.random.default_rng(0).random((2, 20, 30), np.float32)
    file = write_cams(cams, "0", [0, 2], {"attn_highres": grid}, (1500, 2000), "compact")
    Image.fromarray(np.zeros((1500, 2000), np.uint8)).save(truth / "0.png")
    names = [str(number) for number in range(60)]
    for name in names[1:]:
        (cams / f"{name}.npz").symlink_to(file)
        (truth / f"{name}.png").symlink_to(truth / "0.png")
    (tmp_path / "split.txt").write_text("".join(f"{name}\n" for name in names))
    (tmp_path / "faults.yaml").write_text(YAML.format(root=tmp_path, model="none.pt"))
    arguments = ["eval_cam.py", "--cam_dir", cams, "--benchmark", tmp_path / "faults.yaml"]
    arguments += ["--num_workers", "1", "--json", tmp_path / "scores.json"]
    first, second = ranks(run_script, *arguments)
    second.until(lambda: opened(second.pid, truth))  # by then the ranks have connected
    second.signal(signal.SIGKILL)
    code, output = ended(first)
    assert code == 1 and output == LOST
    assert ended(second)[0] == -signal.SIGKILL
    assert not (tmp_path / "scores.json").exists()
    assert run_here("eval_cam", capsys, monkeypatch, *arguments[1:])[0] == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["images"] == len(names)


def lose_rank_1() -> None:
    def main():
        gather("before the loss")
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        gather("never completes")

    command(main)


def test_ranks_that_wait_for_a_lost_rank_exit_with_an_error():
    """Without torchrun: it would end rank 0 itself, but only on the same machine."""
    (code, output), (lost, _) = (ended(rank) for rank in ranks(lose_rank_1))
    assert (code, lost) == (1, -signal.SIGKILL)
    assert output == LOST


class KillYourself(Step):
    """The second process kills itself while the first one works."""

    def __init__(self, marks: str):
        self.marks = marks

    def start(self, worker_index):
        self.worker_index = worker_index

    def decode(self, name):
        if self.worker_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return Decoded(name)

    def compute(self, batch):
        time.sleep(0.05)
        return batch

    def write(self, decoded, result):
        (Path(self.marks) / decoded.name).touch()


def test_a_killed_worker_is_noticed_while_the_others_work(tmp_path):
    with pytest.raises(ChildProcessError, match="exit code -9"):
        Run(None).map(KillYourself(str(tmp_path)), [str(n) for n in range(2000)], num_workers=2)
    assert len(list(tmp_path.iterdir())) < 500  # the first process has 1000 names


# A full disk


class Disk:
    """A folder with room for `pages` of 4096 bytes, until `make_room` is called."""

    def __init__(self, folder: Path, kind: str, monkeypatch):
        self.folder, self.kind, self.monkeypatch = folder, kind, monkeypatch
        self.mounted = False
        folder.mkdir()

    def shrink_to(self, pages: int) -> None:
        if self.kind == "simulated":
            self.pages = pages
            self.monkeypatch.setattr(files, "open", self._open, raising=False)
            return
        mount = ["mount", "-t", "tmpfs", "-o", f"size={max(1, pages) * 4096}", "tmpfs", str(self.folder)]
        try:
            subprocess.run(mount, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"a tmpfs cannot be mounted here: {getattr(error, 'stderr', '') or error}")
        self.mounted = True
        if pages == 0:
            (self.folder / "other").write_bytes(b"x" * 4096)

    def make_room(self) -> None:
        self.pages = 10**6
        if self.kind == "tmpfs":
            remount = ["mount", "-o", "remount,size=64m", str(self.folder)]
            subprocess.run(remount, check=True)

    def close(self) -> None:
        if self.mounted:
            subprocess.run(["umount", str(self.folder)], check=True)

    def _open(self, file: Path, mode: str):
        if mode == "rb":
            return open(file, mode)
        disk = self

        class Limited(io.FileIO):
            def write(self, data) -> int:
                disk.pages -= -(-len(data) // 4096)
                if disk.pages < 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return super().write(data)

        return io.BufferedWriter(Limited(file, mode), 1 << 20)


@pytest.fixture(params=["tmpfs", "simulated"])
def disk(request, tmp_path, monkeypatch):
    limited = Disk(tmp_path / "disk", request.param, monkeypatch)
    yield limited
    limited.close()


def assert_one_error(code: int, errors: str, what: str) -> None:
    assert code == 1
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "no space is left to write" in lines[0] and what in lines[0], errors
    assert "Traceback" not in errors


@pytest.fixture
def few(tmp_path) -> Path:
    return write_world(tmp_path / "few", ["a", "b", "c", "d", "e", "f"])


@pytest.fixture
def masks_of_few(few, tmp_path, capsys, monkeypatch) -> dict[str, bytes]:
    out = tmp_path / "enough"
    assert run_here("pseudo_masks", capsys, monkeypatch, *flags_of(few), "--output", out)[0] == 0
    return contents(out)


@pytest.mark.parametrize("pages, what", [(4, ".png"), (0, "settings.json")])
def test_a_full_disk_stops_a_run_and_a_rerun_completes_it(
    disk, pages, what, few, masks_of_few, capsys, monkeypatch
):
    out = disk.folder / "masks"
    flags = [*flags_of(few), "--output", out]
    disk.shrink_to(pages)
    code, errors = run_here("pseudo_masks", capsys, monkeypatch, *flags)
    assert_one_error(code, errors, what)
    written = contents(out)
    assert written.items() < masks_of_few.items() and bool(written) == bool(pages)
    assert not list(out.glob("*.tmp"))
    disk.make_room()
    assert run_here("pseudo_masks", capsys, monkeypatch, *flags)[0] == 0
    assert contents(out) == masks_of_few and json.loads((out / "settings.json").read_text())


def test_a_disk_without_room_for_the_list_of_failures(disk, few, capsys, monkeypatch):
    (few.parent / "split.txt").write_text("a 0\nlost 1\n")
    out = disk.folder / "masks"
    flags = [*flags_of(few), "--output", out]
    disk.shrink_to(2)  # settings.json, a.png
    code, errors = run_here("pseudo_masks", capsys, monkeypatch, *flags)
    assert_one_error(code, errors, "failed.txt")
    assert "failed: lost: no image lost" in errors
    assert {file.name for file in out.iterdir()} == {"settings.json", "a.png"}
    disk.make_room()
    assert run_here("pseudo_masks", capsys, monkeypatch, *flags)[0] == 1
    assert (out / "failed.txt").read_text().startswith("lost\tno image lost")


def test_a_disk_without_room_for_a_shard(disk, few, masks_of_few, tmp_path, capsys, monkeypatch):
    for index, names in enumerate(["abc", "def"]):
        with tarfile.open(tmp_path / f"{index}.tar", "w") as archive:
            for name in names:
                archive.add(few.parent / "images" / f"{name}.jpg", f"{name}.jpg")
    out = disk.folder / "shards"
    flags = [*flags_of(few), "--shards", tmp_path / "{0,1}.tar", "--labels", few.parent / "split.txt"]
    flags += ["--output", out]
    disk.shrink_to(5)  # settings.json, 0.tar of 10240 bytes
    code, errors = run_here("pseudo_masks", capsys, monkeypatch, *flags)
    assert_one_error(code, errors, "1.tar")
    assert {file.name for file in out.iterdir()} == {"settings.json", "0.tar"}
    disk.make_room()
    assert run_here("pseudo_masks", capsys, monkeypatch, *flags)[0] == 0
    masks_in_shards = {}
    for index in range(2):
        with tarfile.open(out / f"{index}.tar") as archive:
            masks_in_shards |= {entry.name: archive.extractfile(entry).read() for entry in archive}
    assert masks_in_shards == masks_of_few


@linux
@pytest.mark.parametrize("disk", ["tmpfs"], indirect=True)
def test_a_full_disk_stops_several_processes(disk, few, masks_of_few, capsys, monkeypatch):
    out = disk.folder / "masks"
    arguments = [*flags_of(few), "--output", out]
    disk.shrink_to(3)
    code, output = ended(Process(run_script, "pseudo_masks.py", *arguments, "--num_workers", "2"))
    assert_one_error(code, output, ".png")
    assert contents(out).items() < masks_of_few.items() and not list(out.glob("*.tmp"))
    disk.make_room()
    assert run_here("pseudo_masks", capsys, monkeypatch, *arguments)[0] == 0
    assert contents(out) == masks_of_few


def test_a_full_disk_elsewhere_also_stops_a_run(few, tmp_path, capsys, monkeypatch):
    """For example the disk of the cache of compiled code."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("pipeline.fused.crf_labels", full)
    flags = [*flags_of(few), "--output", tmp_path / "masks"]
    code, errors = run_here("pseudo_masks", capsys, monkeypatch, *flags)
    sentence = "error: [Errno 28] No space left on device: free disk space and run the same command again\n"
    assert (code, errors) == (1, sentence)


# Damaged, unusual, large and many images


def test_damaged_images_fail_and_unusual_sizes_work(tmp_path, capsys, monkeypatch):
    names = ["good", "cut", "empty", "text", "dot", "line", "deep"]
    benchmark = write_world(tmp_path / "world", names)
    images = tmp_path / "world" / "images"
    content = (images / "cut.jpg").read_bytes()
    (images / "cut.jpg").write_bytes(content[: len(content) * 2 // 3])
    (images / "empty.jpg").write_bytes(b"")
    (images / "text.jpg").write_text("no image\n")
    parity_image("dot", (1, 1)).save(images / "dot.jpg")
    parity_image("line", (1, 500)).save(images / "line.jpg")
    (images / "deep.jpg").unlink()
    Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30)).save(images / "deep.png")
    out = tmp_path / "masks"
    flags = [*flags_of(benchmark), "--output", out, "--keep_cams", "full"]
    code, errors = run_here("pseudo_masks", capsys, monkeypatch, *flags)
    assert code == 1 and "7 images, 4 failed" in errors and "Traceback" not in errors
    for sentence in (
        "failed: cut: image {}/cut.jpg cannot be read: image file is truncated",
        "failed: empty: image {}/empty.jpg cannot be read: it is not an image",
        "failed: text: image {}/text.jpg cannot be read: it is not an image",
        "failed: deep: image {}/deep.png has more than 8 bits (mode I;16): convert it to 8 bits",
    ):
        assert sentence.format(images) in errors, errors
    sizes = {"good": (60, 80), "dot": (1, 1), "line": (1, 500)}
    assert {name: read_mask(out / f"{name}.png").shape for name in sizes} == sizes
    assert {name: camfile.read(out / "cams", name)[1].shape[1:] for name in sizes} == sizes
    assert set(contents(out)) == {f"{name}.png" for name in sizes}
    (tmp_path / "world" / "split.txt").write_text("good 0 2\ndot 0 2\nline 0 2\n")  # only images that work
    assert run_here("pseudo_masks", capsys, monkeypatch, *flags)[0] == 0


def peak_of(*words) -> float:
    """Run a script in this process; return the peak memory of the process in MB."""
    try:
        run_script(*words)
    except SystemExit as end:
        assert end.code == 0
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def measured(*words) -> tuple[str, float]:
    """Run a script in a new process; return its output and peak memory in MB."""
    code, output, memory = Process(peak_of, *words).end()
    assert code == 0, output
    return output, memory


@linux
def test_memory_is_bounded_for_a_very_large_image(tmp_path, capsys, monkeypatch):
    benchmark = write_world(tmp_path / "world", ["large"], (9000, 12000))
    small = ["--crf_max_pixels", "100000"]
    flags = [*flags_of(benchmark), "--max_patches", "300"]
    fused, stepwise, cams = tmp_path / "fused", tmp_path / "stepwise", tmp_path / "cams"
    arguments = [*flags, *small, "--output", fused]
    output, memory = measured("pseudo_masks.py", *arguments)
    assert "images shrunk to 100000 pixels for the CRF (--crf_max_pixels): 1 (large)" in output
    assert "images shrunk to 300 patches (--max_patches): 1 (large)" in output
    assert memory < 2500
    mask = read_mask(fused / "large.png")
    assert mask.shape == (9000, 12000) and len(np.unique(mask)) > 1
    flags += ["--cam_format", "compact", "--output", cams]
    assert run_here("generate_cams", capsys, monkeypatch, *flags)[0] == 0
    flags = ["--cam_dir", cams, "--num_workers", 1, *small, "--output", stepwise]
    assert run_here("eval_cam_with_crf", capsys, monkeypatch, *flags)[0] == 0
    assert (read_mask(stepwise / "large.png") == mask).mean() > 0.999


@linux
def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    benchmark = write_world(tmp_path / "world", [f"{number:04}" for number in range(2000)], (16, 16))
    lines = (tmp_path / "world" / "split.txt").read_text().splitlines(keepends=True)
    (tmp_path / "few.txt").write_text("".join(lines[:400]))
    memory = {}
    for count, more in ((400, ["--split_file", tmp_path / "few.txt"]), (2000, [])):
        out = tmp_path / f"masks_{count}"
        arguments = [*flags_of(benchmark), "--batch_size", "32", *more, "--output", out]
        output, memory[count] = measured("pseudo_masks.py", *arguments)
        assert f"{count} images, 0 failed" in output and len(list(out.glob("*.png"))) == count
    assert memory[2000] < 1.1 * memory[400]


# Evaluation


def test_damaged_files_at_evaluation_are_counted_and_listed(tmp_path, capsys, monkeypatch):
    cams, truth = tmp_path / "cams", tmp_path / "truth"
    truth.mkdir()
    names = ["good", "cut", "other_size", "bad_truth"]
    for name in names:
        maps = {"attn_highres": np.full((1, 4, 5), 0.9, np.float32)}
        write_cams(cams, name, [1], maps, (40, 50), "compact")
        size = (50, 40) if name == "other_size" else (40, 50)
        Image.fromarray(np.full(size, 2, np.uint8)).save(truth / f"{name}.png")
    (cams / "cut.npz").write_bytes((cams / "cut.npz").read_bytes()[:300])
    (truth / "bad_truth.png").write_bytes((truth / "bad_truth.png").read_bytes()[:50])
    (tmp_path / "split.txt").write_text("".join(f"{name}\n" for name in names))
    (tmp_path / "faults.yaml").write_text(YAML.format(root=tmp_path, model="none.pt"))
    for workers in (1, 2):
        flags = ["--cam_dir", cams, "--benchmark", tmp_path / "faults.yaml", "--num_workers", workers]
        code, errors = run_here("eval_cam", capsys, monkeypatch, *flags, "--json", tmp_path / "scores.json")
        assert code == 1 and "4 images, 3 failed" in errors
        assert "has CAMs of an image of size (40, 50) (H, W), expected (50, 40)" in errors
        assert f"failed: cut: {cams / 'cut.npz'} cannot be read as a CAM file" in errors
        assert f"failed: bad_truth: image {truth / 'bad_truth.png'} cannot be read" in errors
        scores = json.loads((tmp_path / "scores.json").read_text())
        assert scores["images"] == 1 and scores["best"]["Pixel Accuracy"] == 1  # damaged files are not scored
        assert scores["failed"] == sorted(names[1:])
