"""Images in tar shards, as WebDataset has them; results are written to shards of the same names.

For image sets that no folder should hold. A shard has `<key>.jpg` (or png) and, if it knows its labels,
`<key>.cls`, class indices as text: `3 17`. A result shard is written when all of it is there.
"""

import re
import tarfile
from collections.abc import Callable, Generator, Iterator, Sequence
from glob import glob
from pathlib import Path
from typing import Any

from pipeline.decode import Sample
from pipeline.flow import flow
from pipeline.processes import Outcome, failed
from segmentation.files import replacing

IMAGES = ("jpg", "jpeg", "png")
LABELS = "cls"


class DamagedShard(ValueError):
    """A shard that cannot be read to its end."""


def shard_files(pattern: str) -> list[str]:
    """The shards of a pattern: `images-{0000..0099}.tar`, `images/*.tar`, or WebDataset's `pipe:` commands.

    Raises:
        FileNotFoundError: there are none, or one is missing.
        ValueError: two have the same name, which their results would have too, or one has none.
    """
    from webdataset.shardlists import expand_urls  # takes a second to import

    files = []
    for part in expand_urls(pattern):
        found = [part] if part.startswith("pipe:") or Path(part).is_file() else sorted(glob(part))
        if not found:
            raise FileNotFoundError(f"shard {part} does not exist")
        files += found
    names = [result_name(file) for file in files]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"--shards names {twice[0]} twice, and results go under the names of their shards")
    return files


def result_name(shard: str) -> str:
    """The name of a result shard: `in-000.tar` for `dir/in-000.tar.gz` or `pipe:curl https://host/in-000.tar`.

    Raises:
        ValueError: the shard says none.
    """
    piped = shard.startswith("pipe:")
    name = r"[^/\s'\"=?&]+" if piped else ".+"
    found = re.search(rf"({name})\.(?:tar|tgz)\b", shard if piped else Path(shard).name)
    if not found:
        raise ValueError(f"shard {shard} names no .tar file, as which its results could be written")
    return f"{found[1]}.tar"


def generate(
    shards: Sequence[str], position: int, output: str, make_step: Callable[..., Any]
) -> Generator[Outcome, None, None]:
    """Make the result shards that are not there yet; see `pipeline.processes`.

    Images that fail are left out of their shard.

    Args:
        shards: see `shard_files`.
        position: of this process.
        output: folder of the result shards.
        make_step: called with `position` and `store`, makes a step of `pipeline.cams` or `pipeline.fused`.
    """
    results: dict[str, dict[str, bytes]] = {}
    step = None
    for shard in shards:
        file = Path(output) / result_name(shard)
        if file.is_file():
            continue
        step = step or make_step(position=position, store=results.__setitem__)
        results.clear()
        try:
            yield from flow(_samples(shard), step.decoder(), step, step.flow)
        except DamagedShard as error:
            yield failed(shard, error)
        else:
            _write(file, results)


def _samples(shard: str) -> Iterator[Sample]:
    from webdataset.tariterators import group_by_keys

    try:
        for sample in group_by_keys(_members(shard)):
            content = next((sample[suffix] for suffix in IMAGES if suffix in sample), None)
            labels = sample[LABELS].decode("utf-8", "replace") if LABELS in sample else None
            yield Sample(sample["__key__"], content, labels)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        reason = error.args[0] if error.args else error  # webdataset puts the whole stream behind it
        raise DamagedShard(f"shard {shard} cannot be read: {reason}") from None


class _Member(tarfile.TarInfo):
    """A member of an archive that ends where it says so: `tarfile` takes damage for the end."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # what an archive ends with
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"it is cut short or damaged ({error})") from None


def _members(shard: str) -> Iterator[dict]:
    """The files of a shard, as webdataset groups them to samples."""
    from webdataset.gopen import gopen

    with gopen(shard) as stream:
        with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Member) as archive:
            for member in archive:
                archive.members = []  # or it keeps them all
                if member.isreg() and not member.name.startswith("__"):  # which are of the archive itself
                    yield {
                        "fname": member.name,
                        "data": archive.extractfile(member).read(),
                        "__url__": shard,
                    }
        while stream.read(2**20):  # what pads it: a command that cannot write to its end would fail
            pass


def _write(file: Path, results: dict[str, dict[str, bytes]]) -> None:
    from webdataset import TarWriter

    with replacing(file) as stream, TarWriter(stream, encoder=False, mtime=0) as archive:
        for name in sorted(results):  # in an order that does not tell which thread was quicker
            entries = {suffix.removeprefix("."): content for suffix, content in results[name].items()}
            archive.write({"__key__": name, **entries})
