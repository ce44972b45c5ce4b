"""What every benchmark's `prepare` shares: looking at each file, saying what is wrong, writing splits."""
import argparse
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

from tqdm import tqdm

from common.files import replacing
from segmentation.images import read_image, read_size
from segmentation.labels import Split

SHOWN = 3  # problems of a kind that are printed; the file lists all

Item = TypeVar("Item")
Result = TypeVar("Result")


class Problem(NamedTuple):
    """One thing that is wrong with the user's copy of the data."""

    kind: str  # "missing image", "bad mask", ...
    sentence: str  # naming the file


class Inspection(NamedTuple):
    """What looking at one image of a data set gave."""

    labels: list[int] | None  # None: they could not be read, or are not to be had
    problems: list[Problem]


@contextmanager
def noting(problems: list[Problem], what: str) -> Iterator[None]:
    """Turn a missing or unreadable file (a `what`: "image", "mask", ...) into a problem and go on."""
    try:
        yield
    except FileNotFoundError as error:
        problems.append(Problem(f"missing {what}", str(error)))
    except (OSError, ValueError) as error:
        problems.append(Problem(f"bad {what}", str(error)))


def image_size(file: str | Path, decode: bool) -> tuple[int, int]:
    """(height, width) of an image, from its header or, with `decode`, after decoding all of it."""
    if not decode:
        return read_size(file)
    image = read_image(file)
    return image.height, image.width


def differing_sizes(name: str, sizes: dict[str, tuple[int, int]]) -> list[Problem]:
    """A problem when the files of image `name` disagree on its (height, width); keys say which file."""
    if len(set(sizes.values())) <= 1:
        return []
    said = ", ".join(f"{source} {height} x {width}" for source, (height, width) in sizes.items())
    return [Problem("differing sizes", f"{name}: height x width differ: {said}")]


def each(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int, what: str
) -> Iterator[tuple[Item, Result]]:
    """Apply a picklable function to all items in `workers` processes; pairs in order, with progress."""
    bar = tqdm(total=len(items), desc=what, unit="image", disable=None)
    with bar:
        if workers == 1:
            for item in items:
                yield item, function(item)
                bar.update()
            return
        with ProcessPoolExecutor(workers) as pool:
            for item, result in zip(items, pool.map(function, items, chunksize=16), strict=True):
                yield item, result
                bar.update()


def write_split(file: Path, split: Split, published: tuple[int, str] | None = None) -> None:
    """Write lines `name index ...` (LF, one blank between fields) and say what was written.

    Args:
        published: number of lines and sha256 of the published list, to compare with.
    """
    content = "".join(" ".join([name, *map(str, labels)]) + "\n" for name, labels in split.items()).encode()
    with replacing(file) as stream:
        stream.write(content)
    verdict = ""
    if published:
        count, sha256 = published
        same = hashlib.sha256(content).hexdigest() == sha256
        verdict = "; sha256 is the published one" if same else (
            f"; sha256 is NOT the published one, so this is another list (published: {count} images)"
        )
    print(f"{file}: {len(split)} images{verdict}")


def report(problems: Iterable[Problem], file: Path) -> int:
    """Print the problems by kind, list them all in `file` (removed when there are none).

    Returns:
        The exit code: 0 when there are none, else 1.
    """
    problems = list(problems)
    if not problems:
        file.unlink(missing_ok=True)
        print("no problems found")
        return 0
    with replacing(file) as stream:
        stream.write("".join(f"{kind}: {sentence}\n" for kind, sentence in problems).encode())
    for kind, count in Counter(problem.kind for problem in problems).items():
        print(f"{kind}: {count}")
        for problem in [problem for problem in problems if problem.kind == kind][:SHOWN]:
            print(f"    {problem.sentence}")
        if count > SHOWN:
            print(f"    ... and {count - SHOWN} more")
    print(f"{len(problems)} problems, all listed in {file}")
    return 1


def make_parser(package: str, description: str) -> argparse.ArgumentParser:
    """A parser with the flags that every `prepare` has; `package` is also the default output folder."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {package}.prepare",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--root", type=Path, required=True, help="your copy of the data set")
    parser.add_argument("--out", type=Path, default=Path(package), help="folder for the lists (%(default)s)")
    parser.add_argument(
        "--check_images", action="store_true", help="decode every image, not only its header (minutes)"
    )
    parser.add_argument(
        "--num_workers", type=_positive, default=os.cpu_count() or 1, help="processes (one for each core)"
    )
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a number of 1 or more, got {text!r}")
    return int(text)
