"""Functions that all `prepare` commands share: inspect files, report problems, write split files."""
import argparse
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

from tqdm import tqdm

from foundation.cli import Parser
from foundation.files import DiskFull, write_file
from foundation.logs import no_progress
from foundation.settings import count
from segmentation.images import find_image, read_image, read_size
from segmentation.names import check_listable

PRINTED = 3  # number of problems of each kind that are printed; the file lists all
EXIT_CODES = """\
Exit code 0: no problems; 1: problems, all listed in OUT/*problems*.txt (the other files are written as far as
possible); 2: wrong usage. A difference from a published list is reported, but is not a problem.
"""

Item = TypeVar("Item")


class Problem(NamedTuple):
    """A fault in the user's copy of the data set."""

    kind: str  # "missing image", "bad mask", ...
    sentence: str  # one line that names the file


@dataclass
class Inspection:
    """Labels, sizes and problems of the files of one image.

    Attributes:
        labels: class indices; None if there is no source of labels or it cannot be read.
        sizes: kind of file ("image", "annotation", "mask", ...) -> its (height, width).
    """

    name: str
    labels: list[int] | None = None
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


@contextmanager
def collecting(problems: list[Problem], kind: str) -> Iterator[None]:
    """Add a missing or unreadable file to `problems` instead of raising; `kind` is "image", "mask", ..."""
    try:
        yield
    except DiskFull:  # later files would fail too
        raise
    except FileNotFoundError as error:
        problems.append(Problem(f"missing {kind}", str(error)))
    except (OSError, ValueError) as error:
        problems.append(Problem(f"bad {kind}", str(error)))


def inspect_image(folder: Path, name: str, decode: bool) -> Inspection:
    """Return an inspection with the size of image `name`, from the header; with `decode`, read all pixels."""
    inspection = Inspection(name)
    with collecting(inspection.problems, "image"):
        file = find_image(folder, name)
        inspection.sizes["image"] = read_image(file).size[::-1] if decode else read_size(file)
    return inspection


def inspect_all(
    inspect: Callable[[Item], Inspection],
    items: Sequence[Item],
    workers: int,
    description: str,
    problems: list[Problem],
) -> dict[str, list[int] | None]:
    """Inspect every image; return image name -> labels in the order of `items`, and extend `problems`."""
    labels = {}
    with ProcessPoolExecutor(workers) as pool:  # starts no process until work is submitted
        inspections = map(inspect, items) if workers == 1 else pool.map(inspect, items, chunksize=16)
        progress = tqdm(inspections, total=len(items), desc=description, unit="image", disable=no_progress())
        for inspection in progress:
            name, sizes = inspection.name, inspection.sizes
            problems += inspection.problems
            with collecting(problems, "name"):
                check_listable(name)
            if len(set(sizes.values())) > 1:
                listed = ", ".join(f"{kind} {height} x {width}" for kind, (height, width) in sizes.items())
                problems.append(Problem("differing sizes", f"{name}: height x width differ: {listed}"))
            labels[name] = inspection.labels
    return labels


def write_split(
    file: Path, split: Mapping[str, Sequence[int]], count: int | None = None, sha256: str | None = None
) -> None:
    """Write lines `name index ...` (LF, one space between fields) and print their number.

    Names that a list cannot contain are left out; `inspect_all` reports them.

    Args:
        split: image name -> class indices, which may be empty.
        count: number of lines of the published list; None: there is no published list.
        sha256: sha256 of the published list; None: only the number of lines is compared.
    """
    split = {name: labels for name, labels in split.items() if _is_listable(name)}
    content = "".join(" ".join([name, *map(str, labels)]) + "\n" for name, labels in split.items()).encode()
    write_file(file, content)
    verdict = ""
    if sha256 and sha256 == hashlib.sha256(content).hexdigest():
        verdict = "; sha256 equals that of the published list"
    elif sha256:
        verdict = f"; sha256 DIFFERS from that of the published list ({count} images)"
    elif count not in (None, len(split)):
        verdict = f"; differs from the published list, which has {count} images"
    print(f"{file}: {len(split)} images{verdict}")


def _is_listable(name: str) -> bool:
    try:
        check_listable(name)
    except ValueError:
        return False
    return True


def report(problems: Sequence[Problem], file: Path) -> int:
    """Print problems by kind, write all to `file` (deleted if there are none); return the exit code."""
    if not problems:
        file.unlink(missing_ok=True)
        print("no problems found")
        return 0
    write_file(file, "".join(f"{kind}: {sentence}\n" for kind, sentence in problems))
    for kind, number in Counter(problem.kind for problem in problems).items():
        print(f"{kind}: {number}")
        for problem in [problem for problem in problems if problem.kind == kind][:PRINTED]:
            print(f"    {problem.sentence}")
        if number > PRINTED:
            print(f"    ... and {number - PRINTED} more")
    print(f"{len(problems)} problems, all listed in {file}")
    return 1


def make_parser(package: str, description: str) -> argparse.ArgumentParser:
    """Return a parser with the flags of all `prepare` commands; `package` is the default output folder."""
    parser = Parser(
        prog=f"python -m {package}.prepare",
        description=description,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flag = parser.add_argument
    flag("--root", type=Path, required=True, help="folder of your copy of the data set")
    flag("--out", type=Path, default=Path(package), help="folder for the split files (%(default)s)")
    flag("--check_images", action="store_true", help="decode every image, not only its header (minutes)")
    flag("--num_workers", type=count, default=os.cpu_count() or 1, help="processes (one for each core)")
    return parser


def run(
    parser: argparse.ArgumentParser, prepare: Callable[[argparse.Namespace], int], args: argparse.Namespace
) -> int:
    """Return the exit code of `prepare(args)`; exit with code 2 after OSError or ValueError."""
    try:
        return prepare(args)
    except (OSError, ValueError) as error:
        parser.error(str(error))
