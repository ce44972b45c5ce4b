"""Images in tar shards, in WebDataset's format; results are written to shards of the same names.

Shards are for image sets that are too large for one folder. A shard contains `<key>.jpg` (or png) and
`<key>.cls`: the labels of the image, as class indices in text such as `3 17`. A result shard is written when
all images of its shard are done.
"""

import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from glob import glob
from pathlib import Path
from typing import ClassVar

from common.files import replacing
from pipeline.cams import CamStep
from pipeline.decode import Sample
from pipeline.flow import decoding, flow
from pipeline.fused import FusedStep
from pipeline.processes import Outcome, failed
from pipeline.run import write_failures
from pipeline.step import Step

IMAGES = ("jpg", "jpeg", "png")
LABELS = "cls"
FAILED = ".failed.txt"  # suffix of the list of failed images of one shard


class DamagedShard(ValueError):
    """A shard that cannot be read to its end."""


def shard_files(pattern: str) -> list[str]:
    """Return the shards of `images-{0000..0099}.tar`, `images/*.tar`, or WebDataset's `pipe:` commands.

    Raises:
        FileNotFoundError: no shard matches, or one does not exist.
        ValueError: two shards, and so their result shards, have the same name, or a shard has no name.
    """
    from webdataset.shardlists import expand_urls  # takes a second to import

    files = []
    for part in expand_urls(pattern):
        matching = [part] if part.startswith("pipe:") or Path(part).is_file() else sorted(glob(part))
        if not matching:
            raise FileNotFoundError(f"--shards: {part} does not exist")
        files += matching
    names = [result_name(file) for file in files]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"--shards: two shards and their results have the name {twice[0]}: rename one")
    return files


def result_name(shard: str) -> str:
    """Return the name of a result shard, such as `in-000.tar` for `pipe:curl https://host/in-000.tar.gz`.

    Raises:
        ValueError: `shard` contains no name of a tar file.
    """
    piped = shard.startswith("pipe:")
    name = r"[^/\s'\"=?&]+" if piped else ".+"
    match = re.search(rf"({name})\.(?:tar|tgz)\b", shard if piped else Path(shard).name)
    if not match:
        raise ValueError(f"--shards: {shard} contains no name of a .tar file for its results: add one")
    return f"{match[1]}.tar"


@dataclass
class ShardStep(Step):
    """Makes one result shard from each shard of images; the names of this step are shards.

    Images that fail are left out of the result shard and listed in a file next to it. As long as the result
    shard exists, they count as failed and are not tried again.

    Attributes:
        images: the step that processes the images of a shard; it passes its output files to its `store`.
        output: folder of the result shards.
    """

    images: CamStep | FusedStep
    output: str
    several: ClassVar[bool] = True
    retry: ClassVar[str] = "remove a result shard to try its images again"

    def __post_init__(self):
        self.flow = replace(self.images.flow, prefetch=1)  # a block is one shard

    def is_done(self, name: str) -> bool:
        return self._file(name).is_file()

    def done_outcomes(self, name: str) -> Iterator[Outcome]:
        """Yield the failures that are listed next to a finished shard."""
        failures = self._file(name).with_suffix(FAILED)
        if failures.is_file():
            for line in failures.read_text().splitlines():
                image, _, message = line.partition("\t")
                yield Outcome(image, failure=message)

    def start(self, worker_index: int) -> None:
        self.results: dict[str, dict[str, bytes]] = {}
        getattr(self.images, "cams", self.images).store = self.results.__setitem__
        self.images.start(worker_index)

    def outcomes(self, names: Sequence[str]) -> Iterator[Outcome]:
        with decoding(self.images.flow) as decode_pool:
            for shard in names:
                self.results.clear()
                failures = []
                try:
                    for outcome in flow(_samples(shard), self.images, decode_pool):
                        if outcome.failure:
                            failures.append((outcome.name, outcome.failure))
                        yield outcome
                except DamagedShard as error:
                    yield failed(shard, error)
                    continue
                write_failures(self._file(shard).with_suffix(FAILED), sorted(failures))
                _write(self._file(shard), self.results)

    def _file(self, shard: str) -> Path:
        return Path(self.output) / result_name(shard)


def _samples(shard: str) -> Iterator[Sample]:
    from webdataset.tariterators import group_by_keys

    names = set()
    try:
        for sample in group_by_keys(_members(shard)):
            name = sample["__key__"]
            if name in names:  # webdataset checks only consecutive samples
                raise ValueError(f"it contains {name} twice")
            names.add(name)
            content = next((sample[suffix] for suffix in IMAGES if suffix in sample), None)
            labels = sample[LABELS].decode("utf-8", "replace") if LABELS in sample else None
            yield Sample(name, content, labels)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        reason = error.args[0] if error.args else error  # webdataset adds the whole stream to the arguments
        raise DamagedShard(f"shard {shard} cannot be read: {reason}") from None


class _Member(tarfile.TarInfo):
    """An archive member that raises if its header is damaged; `tarfile` alone would end the archive there."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # the regular end of an archive
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"it is cut short or damaged ({error})") from None


def _members(shard: str) -> Iterator[dict]:
    """Yield the files of a shard in the form that webdataset's `group_by_keys` expects."""
    from webdataset.gopen import gopen

    with gopen(shard) as stream:
        with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Member) as archive:
            for member in archive:
                archive.members = []  # otherwise it keeps all members in memory
                if member.isreg() and not member.name.startswith("__"):  # __ marks metadata of the archive
                    content = archive.extractfile(member).read()
                    yield {"fname": member.name, "data": content, "__url__": shard}
        while stream.read(2**20):  # read the padding: some `pipe:` commands fail if the pipe closes early
            pass


def _write(file: Path, results: dict[str, dict[str, bytes]]) -> None:
    from webdataset import TarWriter

    with replacing(file) as stream, TarWriter(stream, encoder=False, mtime=0) as archive:
        for name in sorted(results):  # sorted: the order in which threads finish varies
            entries = {suffix.removeprefix("."): content for suffix, content in results[name].items()}
            archive.write({"__key__": name, **entries})
