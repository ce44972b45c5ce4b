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

from common.files import replacing
from pipeline.decode import Sample
from pipeline.flow import decoding, flow
from pipeline.processes import Outcome, failed
from pipeline.run import list_failures

IMAGES = ("jpg", "jpeg", "png")
LABELS = "cls"
FAILED = ".failed.txt"  # of one shard's images
RETRY = "remove a shard to try its images again"


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

    Images that fail are left out of their result shard and listed in a file beside it; while the shard is
    there they fail again, without another try.

    Args:
        shards: see `shard_files`.
        position: of this process.
        output: folder of the result shards.
        make_step: called with `position` and `store`, makes a step of `pipeline.cams` or `pipeline.fused`.
    """
    missing = []
    for shard in shards:
        file = Path(output) / result_name(shard)
        if file.is_file():
            yield from _listed(file.with_suffix(FAILED))
        else:
            missing.append((shard, file))
    if not missing:  # and no model is needed
        return
    results: dict[str, dict[str, bytes]] = {}
    step = make_step(position=position, store=results.__setitem__)
    with decoding(step.flow) as decoder:
        for shard, file in missing:
            results.clear()
            failures = []
            try:
                for outcome in flow(_samples(shard), step.decoder(), step, step.flow, decoder):
                    if outcome.failure:
                        failures.append((outcome.name, outcome.failure))
                    yield outcome
            except DamagedShard as error:
                yield failed(shard, error)
                continue
            list_failures(file.with_suffix(FAILED), sorted(failures))
            _write(file, results)


def _listed(file: Path) -> Iterator[Outcome]:
    """The failures of a shard that was made before."""
    if file.is_file():
        for line in file.read_text().splitlines():
            name, _, sentence = line.partition("\t")
            yield Outcome(name, failure=sentence)


def _samples(shard: str) -> Iterator[Sample]:
    from webdataset.tariterators import group_by_keys

    seen = set()
    try:
        for sample in group_by_keys(_members(shard)):
            if sample["__key__"] in seen:  # webdataset notices only what follows at once
                raise ValueError(f"it holds {sample['__key__']} twice, apart")
            seen.add(sample["__key__"])
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
