"""One run over many images: the output folder and its settings, progress, failures, exit code."""

import json
import os
import platform
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.files import DiskFull, replacing, sweep
from pipeline import processes
from pipeline.processes import Outcome, Work
from segmentation.distributed import WorkFailed, gather, rank_and_world

PACKAGES = ("torch", "torchvision", "numpy", "opencv-python-headless", "pillow", "pydensecrf2", "numba")
SETTINGS = "settings.json"
FAILED = "failed.txt"
SHOWN = 5  # names or failures listed before "..."


def command(main: Callable[[], int | None], again: str = "the same command continues") -> None:
    """Run a script's `main` and exit with what it returns, or 2 for errors that the user can mend.

    `again` is told after Ctrl-C: how one goes on.

    Those are told in one sentence; the environment variable CLIP_WSSS_DEBUG=1 shows the traceback too.
    """
    try:
        code = main() or 0
    except KeyboardInterrupt:
        print(f"interrupted: {again}", file=sys.stderr)
        code = 130
    except (ValueError, OSError) as error:
        if os.environ.get("CLIP_WSSS_DEBUG") == "1":
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        code = 1 if isinstance(error, ChildProcessError | DiskFull | WorkFailed) else 2
    sys.exit(code)


class Run:
    """One run of a step: `Run(folder, ...)`, `map` what it does over the images, return `finish()`.

    Args:
        folder: output folder, made if missing; None when the step writes no files.
        settings: what the outputs depend on, JSON values, among them "benchmark": what
            `segmentation.benchmark.load` is to be given by later steps.
        inputs: sha256 by name of the files they depend on, e.g. {"model": ...}.
        outputs: file patterns of the outputs, e.g. ("*.npy", "*.npz").
        overwrite: remove the outputs of the last run and start anew.
        step: what fills the folder, e.g. "cams"; no other step may fill it, nor overwrite it.
        info: recorded beside the settings, not compared with those of the last run.
        retry: how failures are tried again.

    Raises:
        ValueError: `folder` holds outputs of other settings (the sentence names them), of another step, or of
            unknown origin.
    """

    def __init__(
        self,
        folder: str | Path | None,
        settings: Mapping[str, Any] | None = None,
        inputs: Mapping[str, str] | None = None,
        outputs: Sequence[str] = (),
        overwrite: bool = False,
        step: str = "",
        info: Mapping[str, Any] | None = None,
        retry: str = "the same command tries them again",
    ):
        self.retry = retry
        self.folder = None if folder is None else Path(folder)
        self.done = 0
        self.failures: list[tuple[str, str]] = []
        self.notes: dict[str, tuple[int, list[str]]] = {}  # how many images, and the first few
        self.rank, self.world = rank_and_world()
        if self.folder is not None and self.rank == 0:
            record = {"step": step, "settings": dict(settings or {}), "inputs": dict(inputs or {})}
            _settle(self.folder, record, outputs, overwrite, dict(info or {}))
        gather(None)  # no rank may write before the folder is settled

    def map(
        self,
        work: Work,
        names: Sequence[str],
        *args,
        num_workers: int = 1,
        block: int = 1,
        counted: bool = True,
    ) -> list:
        """Do `work(names, position, *args)`, `names` shared out among processes in blocks (`processes.run`).

        Under torchrun every rank takes its part of `names` and may itself have `num_workers` processes.
        `counted` says that there will be one outcome for each name.

        Returns:
            What each call of `work` returned; under torchrun those of all ranks, on all ranks.
        """
        names = processes.shard(names, self.rank, self.world, block)
        # Rank 0 speaks for all; disable=None is quiet when stderr is no terminal.
        total, disable = len(names) if counted else None, True if self.rank else None
        with tqdm(total=total, unit="image", disable=disable) as bar:

            def take(outcome: Outcome) -> None:
                self.take(outcome)
                bar.update()

            results = processes.run(work, names, args, num_workers, take, block)
        return [result for part in gather(results) for result in part]

    def take(self, outcome: Outcome) -> None:
        """Count one image."""
        self.done += 1
        if outcome.failure:
            self.failures.append((outcome.name, outcome.failure))
        for note in outcome.notes:
            self._note(note, 1, [outcome.name])

    def _note(self, note: str, count: int, names: list[str]) -> None:
        before, first = self.notes.get(note, (0, []))
        self.notes[note] = before + count, sorted([*first, *names])[:SHOWN]

    def finish(self) -> int:
        """Tell what failed and what is worth knowing; write `failed.txt`, or remove it.

        From here on `failures` holds those of all torchrun ranks.

        Returns:
            The exit code: 1 if an image failed, else 0.
        """
        parts = gather((self.done, self.failures, self.notes))
        self.failures = failures = sorted(failure for _, failed, _ in parts for failure in failed)
        if self.rank == 0:
            print(f"{sum(done for done, _, _ in parts)} images, {len(failures)} failed", file=sys.stderr)
            for _, _, notes in parts[1:]:  # those of rank 0 are here
                for note, (count, names) in notes.items():
                    self._note(note, count, names)
            for note, (count, names) in sorted(self.notes.items()):
                print(f"{note}: {count} ({some(names, count)})", file=sys.stderr)
            for name, sentence in failures[:SHOWN]:
                print(f"failed: {name}: {sentence}", file=sys.stderr)
            if self.folder is not None:
                list_failures(self.folder / FAILED, failures)
                if failures:
                    print(f"all failures: {self.folder / FAILED}; {self.retry}", file=sys.stderr)
        return 1 if failures else 0


def read_settings(folder: str | Path) -> dict:
    """What the run that filled `folder` recorded: "step", "settings", "inputs", "versions"; {} if nothing.

    Raises:
        ValueError: the record is damaged.
    """
    file = Path(folder) / SETTINGS
    if not file.is_file():
        return {}
    try:
        record = json.loads(file.read_text())
        if not isinstance(record, dict):
            raise ValueError("it holds no dict")
        for part in ("settings", "inputs", "versions"):
            if not isinstance(record.get(part, {}), dict):
                raise ValueError(f"its {part} are no dict")
        return record
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): restore it, or remove {folder}") from None


def some(names: Sequence[str], count: int | None = None) -> str:
    """The first few of `names`, for one line; of `count` if these are not all."""
    return ", ".join(names[:SHOWN]) + (", ..." if (count or len(names)) > SHOWN else "")


def check_folder(
    folder: str | Path,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
    outputs: Sequence[str],
    overwrite: bool,
    step: str,
) -> list[Path]:
    """Would a `Run` take this folder? Changes nothing.

    Returns:
        The outputs of the last run that it would remove.

    Raises:
        ValueError: see `Run`.
    """
    folder = Path(folder)
    last = read_settings(folder)
    existing = [file for pattern in outputs for file in folder.rglob(pattern)]
    if not last:
        if existing:  # perhaps ground truth, or another project's: neither to keep nor to remove
            raise ValueError(
                f"{folder} holds {existing[0].name} but no {SETTINGS}: it was not filled by this command, "
                "choose another folder"
            )
    elif last.get("step", "") != step:
        raise ValueError(
            f"{folder} is the folder of another step ({last.get('step') or 'unnamed'}, not "
            f"{step or 'unnamed'}): choose another folder"
        )
    elif overwrite:
        _check_depth(folder, existing)
        return existing
    elif existing:  # a run that failed before its first output binds nobody
        _compare(folder, last, {"settings": settings, "inputs": inputs})
    return []


def _settle(folder: Path, record: dict, outputs: Sequence[str], overwrite: bool, info: dict) -> None:
    sweep(folder)
    removed = check_folder(folder, record["settings"], record["inputs"], outputs, overwrite, record["step"])
    for file in removed:
        file.unlink()
    with replacing(folder / SETTINGS) as stream:
        content = {**record, "info": info, "versions": _versions()}
        stream.write(json.dumps(content, indent=2).encode() + b"\n")


def _check_depth(folder: Path, files: list[Path]) -> None:
    """If some of the files lie deeper in the folder, their origin is unknown: none is to be removed."""
    deeper = next((file for file in files if file.parent != folder), None)
    if deeper is not None:
        raise ValueError(
            f"{folder} also holds {deeper.relative_to(folder)}, and --overwrite removes nothing from folders "
            "within: move it away, or choose another folder"
        )


def _compare(folder: Path, last: dict, now: dict) -> None:
    last, now = ({**record.get("settings", {}), **record.get("inputs", {})} for record in (last, now))
    now = json.loads(json.dumps(now))  # as the file has it: tuples become lists
    differ = [key for key in sorted({*last, *now}) if last.get(key) != now.get(key)]
    if differ:
        told = ", ".join(f"{key} (was {last.get(key)!r}, now {now.get(key)!r})" for key in differ)
        raise ValueError(
            f"{folder} was filled with other settings: {told}; choose another folder, or --overwrite"
        )


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def list_failures(file: Path, failures: Sequence[tuple[str, str]]) -> None:
    """Write images and the sentences they failed with, a line each; without any, remove the last list."""
    if not failures:
        file.unlink(missing_ok=True)
        return
    with replacing(file) as stream:
        stream.write("".join(f"{name}\t{sentence}\n" for name, sentence in failures).encode())
