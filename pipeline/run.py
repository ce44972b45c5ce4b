"""A run over many images: output folder, recorded settings, progress, failures, exit code."""

import hashlib
import json
import logging
import math
import os
import platform
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from tqdm import tqdm

from foundation.files import DiskFull, sweep, write_file
from foundation.jsonfile import read_json
from foundation.logs import log, no_progress
from pipeline import processes
from pipeline.processes import Outcome
from pipeline.step import Step, run_step
from segmentation.distributed import WorkFailed, gather, rank_and_world, together

PACKAGES = ("torch", "torchvision", "numpy", "opencv-python-headless", "pillow", "pydensecrf2", "numba")
SETTINGS = "settings.json"
FAILED = "failed.txt"
SHOWN = 5  # names or failures listed before "..."
# Name of a setting in the records of earlier versions -> its present name.
RENAMED = {
    "averaged": "affinity_layers",
    "leave_out_last": "exclude_last_layer",
    "cover_edge": "include_edge",
    "method": "cam_method",
    "scales": "cam_scales",
    "voting": "voting_layers",
}


def command(main: Callable[[], int | None], again: str = "the same command continues") -> None:
    """Run a script's `main` and exit with its return value.

    After Ctrl-C, log `again`, which says how to continue, and exit with code 130. User errors (ValueError,
    OSError) log one line and exit with code 2; -v logs the traceback too. The errors that stop a run in
    progress (ChildProcessError, DiskFull, WorkFailed) exit with code 1.
    """
    try:
        code = main() or 0
    except KeyboardInterrupt:
        log.warning("interrupted: %s", again)
        code = 130
    except (ValueError, OSError) as error:
        log.debug("traceback of the error", exc_info=True)
        log.error("error: %s", error)
        code = 1 if isinstance(error, ChildProcessError | DiskFull | WorkFailed) else 2
    sys.exit(code)


@dataclass(frozen=True)
class Record:
    """Record of the run that fills an output folder, written to `settings.json`.

    Attributes:
        step: name such as "cams"; no other step may fill or overwrite the folder.
        settings: JSON values that the outputs depend on; "benchmark" is what later steps load.
        inputs: name -> sha256 of each file that the outputs depend on, such as {"model": ...}.
        outputs: file patterns of the outputs, such as ("*.npy", "*.npz").
        info: further values; runs with different values may fill the same folder.
        defaults: default values of settings. If an earlier record lacks a setting, the earlier run is assumed
            to have used the default.
    """

    step: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    outputs: Sequence[str] = ()
    info: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)


class Run:
    """One run of a step: `Run(folder, record)`, `map` a step over the images, return `finish()`.

    Args:
        folder: output folder, made if missing; None if the step writes no files.
        overwrite: remove the outputs of the last run and start from scratch.
        further: further output folders of the run, and their records.

    Raises:
        ValueError: see `check_folder`.
    """

    def __init__(
        self,
        folder: str | Path | None,
        record: Record | None = None,
        overwrite: bool = False,
        further: Mapping[str | Path, Record] | None = None,
    ):
        self.folder = None if folder is None else Path(folder)
        self.records: dict[Path, dict] = {}  # on rank 0: output folder -> content of its record
        self.removed: list[Path] = []  # on rank 0: output folders that were removed during the run
        self.retry = Step.retry
        self.done = 0
        self.failures: list[tuple[str, str]] = []
        self.notes: dict[str, tuple[int, list[str]]] = {}  # number of images, and the first few names
        self.rank, self.world = rank_and_world()
        if self.rank == 0:
            folders = {} if folder is None else {**(further or {}), folder: record or Record()}
            for path, its_record in folders.items():
                self.records[Path(path)] = _fill(Path(path), its_record, overwrite)
        gather(None)  # no rank may write outputs before the record exists

    def map(self, step: Step, names: Sequence[str], num_workers: int = 1) -> list:
        """Run a step over images, divided among processes in blocks of `step.flow.prefetch`.

        Under torchrun every rank takes its part of `names` and starts `num_workers` processes.

        Returns:
            The return value of `step.finish` of each process of all ranks, on all ranks.
        """
        self.retry, block = step.retry, step.flow.prefetch
        names = processes.part_of(names, self.rank, self.world, block)
        total = None if step.several else len(names)
        # The bar on rank 0 counts only the images of rank 0: the other ranks take about as long.
        with tqdm(total=total, unit="image", disable=no_progress(self.rank > 0)) as bar:

            def take(outcome: Outcome) -> None:
                self.take(outcome)
                bar.update()

            results = processes.run(run_step, names, (step,), num_workers, take, block)
        return [result for part in gather(results) for result in part]

    def take(self, outcome: Outcome) -> None:
        """Count one image."""
        self.done += 1
        self._restore_records()
        if outcome.failure:
            self.failures.append((outcome.name, outcome.failure))
        for note in outcome.notes:
            self._add_note(note, 1, [outcome.name])

    def _restore_records(self) -> None:
        """Write the records of output folders that were removed or emptied during the run.

        Without them, the same command would refuse the folders. The check takes a few us per folder.
        """
        for folder, content in self.records.items():
            if not os.path.isfile(folder / SETTINGS):
                write_json(folder / SETTINGS, content)
                if folder not in self.removed:
                    self.removed.append(folder)

    def check_folders(self, again: str = "run the same command again to make them") -> None:
        """Raise WorkFailed on rank 0 if an output folder was removed, emptied or filled by another run.

        Args:
            again: how to continue, shown in the error.
        """
        self._restore_records()
        for folder, content in self.records.items():
            if folder in self.removed:
                raise WorkFailed(
                    f"{folder} was removed or emptied during the run, and files are missing: {again}"
                )
            same = ("step", "settings", "inputs")
            now, before = read_settings(folder), _as_read(content)
            if any(now.get(part) != before.get(part) for part in same):
                raise WorkFailed(
                    f"another run with other settings filled {folder} during this run: its files are mixed; "
                    "remove the folder, and run one command after the other"
                )

    def _add_note(self, note: str, count: int, names: list[str]) -> None:
        """Count a note, and keep only a few image names, so that memory does not grow with their number."""
        total, first = self.notes.get(note, (0, []))
        self.notes[note] = total + count, sorted([*first, *names])[: SHOWN + 1]

    def finish(self) -> int:
        """Log failures and notes of all ranks, and write or remove `failed.txt`.

        Afterwards, `self.failures` contains the failures of all ranks.

        Returns:
            The exit code: 1 if an image failed, else 0.

        Raises:
            WorkFailed: see `check_folders`.
        """
        parts = gather((self.done, self.failures, self.notes))
        self.failures = failures = sorted(failure for _, failed, _ in parts for failure in failed)
        if self.rank == 0:
            total = sum(done for done, _, _ in parts)
            log.log(
                logging.WARNING if failures else logging.INFO, "%d images, %d failed", total, len(failures)
            )
            for _, _, notes in parts[1:]:  # self.notes already contains rank 0's
                for note, (count, names) in notes.items():
                    self._add_note(note, count, names)
            for note, (count, names) in sorted(self.notes.items()):
                log.warning("%s: %d (%s)", note, count, first_few(names))
            for name, message in failures[:SHOWN]:
                log.warning("failed: %s: %s", name, message)
            if self.folder is not None:
                write_failures(self.folder / FAILED, failures)
                if failures:
                    log.warning("all failures: %s; %s", self.folder / FAILED, self.retry)
        with together():
            self.check_folders()
        return 1 if failures else 0


def read_settings(folder: str | Path) -> dict:
    """Return the record of the run that filled `folder`: "step", "settings", "inputs", "versions".

    If there is no record, return {}.
    Settings of earlier versions are returned under their present names (`RENAMED`).

    Raises:
        ValueError: the record is damaged.
    """
    file = Path(folder) / SETTINGS
    if not file.is_file():
        return {}
    try:
        record = read_json(file)
        if not isinstance(record.get("step", ""), str):
            raise ValueError("its step is not a name")
        for part in ("settings", "inputs", "versions"):
            if not isinstance(record.get(part, {}), dict):
                raise ValueError(f"its {part} are not a JSON object")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({error}): restore it, or remove {folder}") from None
    return _with_present_settings(record)


def _with_present_settings(record: dict) -> dict:
    if "settings" in record:
        record["settings"] = _with_present_names(record["settings"])
    return record


def _as_read(content: Mapping[str, Any]) -> dict:
    """Return the content of a record as `read_settings` returns it: JSON has no tuples and no NaN."""
    return _with_present_settings(json.loads(json.dumps(_without_nan(content))))


def _with_present_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {RENAMED.get(key, key): value for key, value in settings.items()}


def fingerprint(record: Mapping[str, Any]) -> str:
    """Return the sha256 of the settings and inputs of recorded CAMs; empty if there is no record.

    The file format is left out, because masks do not depend on it. Settings enter the hash under the names
    of the first version, so that masks of earlier versions are recognized.

    Args:
        record: see `read_settings`.
    """
    origin = {part: dict(record[part]) for part in ("settings", "inputs") if part in record}
    if "settings" in origin:
        origin["settings"].pop("cam_format", None)
        first_names = {present: first for first, present in RENAMED.items()}
        origin["settings"] = {first_names.get(key, key): value for key, value in origin["settings"].items()}
    return hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest() if origin else ""


def write_json(file: str | Path, content: Mapping[str, Any]) -> None:
    """Write JSON; NaN becomes null, because JSON has no NaN."""
    write_file(file, json.dumps(_without_nan(content), indent=2) + "\n")


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def first_few(names: Sequence[str]) -> str:
    """Return the first few of `names` in one line, followed by "..." if there are more."""
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def check_folder(folder: str | Path, record: Record, overwrite: bool = False) -> list[Path]:
    """Check that a `Run` may fill this folder, without changing it.

    Returns:
        The outputs of the last run that the new run would remove; empty without `overwrite`.

    Raises:
        ValueError: the folder contains outputs of other settings (the message names them), of another step,
            or of unknown origin.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output {folder} is a file: give a folder")
    last = read_settings(folder)
    existing = [file for pattern in record.outputs for file in folder.rglob(pattern)]
    if not last:
        if existing:  # these may be ground truth or files of another project
            raise ValueError(
                f"{folder} contains {existing[0].name} but no {SETTINGS}, so this command did not fill it: "
                "choose another folder"
            )
        return []
    if last.get("step", "") != record.step:
        raise ValueError(
            f"{folder} contains the outputs of step {last.get('step') or 'unnamed'}, not of "
            f"{record.step or 'unnamed'}: choose another folder"
        )
    if overwrite:
        for file in existing:
            if file.parent != folder:
                raise ValueError(
                    f"{folder} also contains {file.relative_to(folder)}, but --overwrite removes nothing in "
                    "subfolders: move this file, or choose another folder"
                )
        return existing
    defaults, settings, inputs = (  # JSON turns tuples into lists
        json.loads(json.dumps(dict(part))) for part in (record.defaults, record.settings, record.inputs)
    )
    before = {**defaults, **last.get("settings", {}), **last.get("inputs", {})}
    now = {**_with_present_names(settings), **inputs}
    differing = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if existing and differing:  # a folder without outputs may change its settings
        changes = ", ".join(f"{key} (was {_short(before, key)}, now {_short(now, key)})" for key in differing)
        raise ValueError(
            f"{folder} was filled with other settings: {changes}; choose another folder, or give --overwrite"
        )
    return []


def _short(values: Mapping[str, Any], key: str) -> str:
    """Return a recorded value for an error message; a sha256 is cut to its first digits."""
    if key not in values:
        return "not recorded"
    text = repr(values[key])
    return f"sha256 {text[1:9]}..." if re.fullmatch("'[0-9a-f]{64}'", text) else text


def _fill(folder: Path, record: Record, overwrite: bool) -> dict:
    """Remove the outputs that an overwriting run replaces; write the record and return its content."""
    sweep(folder)
    for file in check_folder(folder, record, overwrite):
        file.unlink()
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    content = {part: getattr(record, part) for part in ("step", "settings", "inputs", "info")}
    content["versions"] = versions
    write_json(folder / SETTINGS, content)
    return content


def write_failures(file: Path, failures: Sequence[tuple[str, str]]) -> None:
    """Write a line `name<TAB>message` for each failed image; without failures, remove the file."""
    if not failures:
        file.unlink(missing_ok=True)
        return
    write_file(file, "".join(f"{name}\t{message}\n" for name, message in failures))
