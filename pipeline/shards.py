"""Images in tar shards, in WebDataset's format; results are written to shards of the same names.

Shards are for image sets that are too large for one folder. A shard contains `<key>.jpg` (or png) and
`<key>.cls`: the labels of the image, as class indices in text such as `3 17`. A result shard is written when
all images of its shard are done.
"""

import bz2
import gzip
import io
import lzma
import os
import re
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from glob import glob
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from foundation.files import replacing
from pipeline.cams import CamStep
from pipeline.decode import Sample
from pipeline.flow import decoding, flow
from pipeline.fused import FusedStep
from pipeline.processes import Outcome, failed
from pipeline.run import write_failures
from pipeline.step import Step
from segmentation.masks import is_whole
from segmentation.names import image_name

IMAGES = ("jpg", "jpeg", "png")
LABELS = "cls"
FAILED = ".failed.txt"  # suffix of the list of failed images of one shard
MAX_BYTES = {**dict.fromkeys(IMAGES, 2**28), LABELS: 2**16}  # of one file: 256 MB, and 64 kB for labels
MAX_HEADER_BYTES = 2**20  # of a long name or other additional header
MAX_ENDS = 10  # reads at the end of a stream; tarfile needs two for a complete archive
# Bytes that a compressed shard may unpack to: 64 MB, and this many per stored byte. JPEGs hardly compress,
# raw masks to a hundredth.
FREE_BYTES, RATIO = 2**26, 256
UNPACK = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}  # by the first bytes
HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)  # types of additional headers, which tarfile reads into memory


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
        file = self._file(name)
        return _is_complete(file, file.with_suffix(FAILED).is_file())

    def done_outcomes(self, name: str) -> Iterator[Outcome]:
        """Yield the failures that are listed next to a finished shard."""
        failures = self._file(name).with_suffix(FAILED)
        if failures.is_file():
            for line in failures.read_text(errors="backslashreplace").split("\n"):
                image, _, message = line.partition("\t")
                if line:
                    yield Outcome(image, failure=message or f"it is listed in {failures}")

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
                    write_failures(self._file(shard).with_suffix(FAILED), sorted(failures))
                    _write(self._file(shard), self.results)
                except (DamagedShard, OSError) as error:  # OSError: its results cannot be written
                    yield failed(shard, error)

    def _file(self, shard: str) -> Path:
        return Path(self.output) / result_name(shard)


class _File(NamedTuple):
    """A file of a shard. `fault` says why it cannot be read; only images and labels are read."""

    name: str
    key: str
    suffix: str
    content: bytes | None
    fault: str


def _samples(shard: str) -> Iterator[Sample]:
    """Yield the samples of a shard: consecutive files with the same key."""
    names = set()
    try:
        for key, files in groupby(_files(shard), key=lambda file: file.key):
            sample = _sample(key, list(files))
            if sample.name in names:
                raise ValueError(
                    f"it contains {sample.name} twice, or the files of this key are not next to each other: "
                    "sort the files by name"
                )
            names.add(sample.name)
            yield sample
    except Exception as error:  # tarfile and the decompressors raise many types on damaged files
        raise DamagedShard(f"shard {shard} cannot be read: {str(error) or type(error).__name__}") from None


def _sample(key: str, files: Sequence[_File]) -> Sample:
    """Return the sample of all files with one key."""
    try:
        name = image_name(key)
    except ValueError as error:
        return Sample(ascii(key)[1:-1], fault=str(error))
    if fault := next((file.fault for file in files if file.fault), ""):
        return Sample(name, fault=fault)
    contents = {file.suffix: file.content for file in files}
    if len(contents) < len(files):
        raise ValueError(f"it contains a file of {name} twice")
    content = next((contents[suffix] for suffix in IMAGES if suffix in contents), None)
    labels = contents.get(LABELS)
    # Files such as `x.2.jpg` and `x.2.cls`. Others, such as `x.depth.png`, may be a further file of sample x.
    dotted = {file.suffix.rpartition(".")[::2]: file.name for file in files if "." in file.suffix}
    images = [stem for stem, kind in dotted if kind in IMAGES]
    labeled = [stem for stem, kind in dotted if kind == LABELS]
    if (content is None and images) or (labels is None and labeled) or set(images) & set(labeled):
        return Sample(
            name,
            fault=f"{next(iter(dotted.values()))}: a key ends at its first dot, so the key of this file is "
            f"{key}: remove the other dots from the names of the files",
        )
    notes = ("samples with further images, not used, because a key ends at its first dot",) if images else ()
    return Sample(name, content, None if labels is None else labels.decode("utf-8", "replace"), notes=notes)


def _files(shard: str) -> Iterator[_File]:
    """Yield the files of a shard that belong to a sample."""
    from webdataset.gopen import gopen

    with gopen(shard) as stream:
        content = _Unpacked(stream)
        options = {"tarinfo": _Member, "encoding": "utf-8", "bufsize": 2**16}
        with tarfile.open(fileobj=content, mode="r|", **options) as archive:
            for member in archive:
                archive.members = []  # otherwise it keeps all members in memory
                folder, slash, name = member.name.rpartition("/")
                stem, dot, suffix = name.partition(".")
                # Names without key or suffix are no part of a sample; __ marks metadata of the archive.
                if stem and dot and not member.isdir() and not member.name.startswith("__"):
                    yield _read(archive, member, folder + slash + stem, suffix.lower())
        while content.read(2**20):  # gzip's checksum is at the end, and some `pipe:` commands must end
            pass


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo, key: str, suffix: str) -> _File:
    """Return a file of a shard, with its content if it is the image or the labels of a sample."""
    kind, shown = suffix.rpartition(".")[2], ascii(member.name)[1:-1]
    content, fault = None, ""
    if kind in MAX_BYTES and (not member.isreg() or member.issparse()):
        fault = (
            f"{shown} is a link, a device or a sparse file: store plain files, for example by tar "
            "--dereference --hard-dereference"
        )
    elif suffix in MAX_BYTES and member.size > MAX_BYTES[suffix]:
        fault = f"{shown} has {member.size} bytes, more than the {MAX_BYTES[suffix]} that are read: shrink it"
    elif suffix in MAX_BYTES:
        content = archive.extractfile(member).read()
    return _File(shown, key, suffix, content, fault)


class _Unpacked:
    """The content of a stream, which is unpacked if it is compressed. A reader for tarfile.

    Raises:
        ValueError: while reading, if it unpacks to far more bytes than are stored, or if it has ended long
            before: to skip a file that declares 1 TB, tarfile would read 100 million times at the end.
    """

    def __init__(self, stream: Any):
        self.stored, self.size, self.ends = _Counted(stream), 0, 0
        unpack = (unpack for start, unpack in UNPACK.items() if self.stored.start.startswith(start))
        self.stream = next(unpack, lambda stream: stream)(self.stored)

    def read(self, size: int) -> bytes:
        content = self.stream.read(size)
        self.size += len(content)
        self.ends += not content
        if self.ends > MAX_ENDS:
            raise ValueError("it is cut short")
        if self.size > FREE_BYTES + RATIO * self.stored.size:
            raise ValueError(f"it unpacks to more than {RATIO} times its size: store it without compression")
        return content


class _Counted:
    """Counts the bytes that are read from a stream; `start` are the first bytes."""

    def __init__(self, stream: Any):
        self.stream, self.start = stream, stream.read(8)
        self.size = len(self.start)

    def read(self, size: int) -> bytes:
        if self.start:
            content, self.start = self.start[:size], self.start[size:]
            return content
        content = self.stream.read(size)
        self.size += len(content)
        return content


class _Member(tarfile.TarInfo):
    """An archive member that raises if its header is damaged; `tarfile` alone would end the archive there."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            member = super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # the regular end of an archive
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"it is cut short or damaged ({error})") from None
        if member.size < 0:
            raise tarfile.ReadError(f"it is damaged: {member.name!a} has the size {member.size}")
        return member

    @classmethod
    def frombuf(cls, buffer: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        header = super().frombuf(buffer, encoding, errors)
        if header.type in HEADERS and not 0 <= header.size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"it is damaged: a header declares {header.size} bytes")
        return header


def _is_complete(file: Path, may_be_empty: bool) -> bool:
    """Return whether a result shard exists and is undamaged, by its headers, its end and the checksums of its
    masks and compact CAM files. This takes 35 us per mask."""
    count = 0
    try:
        with open(file, "rb") as stream:
            stream.seek(-2 * tarfile.BLOCKSIZE, os.SEEK_END)
            if any(stream.read()):  # an archive ends with two empty blocks
                return False
            stream.seek(0)
            with tarfile.open(fileobj=stream, mode="r:", tarinfo=_Member) as archive:
                for member in archive:
                    archive.members = []
                    count += 1
                    suffix = Path(member.name).suffix
                    if member.issparse() or not member.isreg():
                        return False
                    if suffix == ".png" and not is_whole(archive.extractfile(member).read()):
                        return False
                    if suffix == ".npz":
                        with zipfile.ZipFile(io.BytesIO(archive.extractfile(member).read())) as content:
                            if content.testzip():
                                return False
    except Exception:  # damaged files raise exceptions of many types
        return False
    return count > 0 or may_be_empty


def _write(file: Path, results: dict[str, dict[str, bytes]]) -> None:
    from webdataset import TarWriter

    with replacing(file) as stream, TarWriter(stream, encoder=False, mtime=0) as archive:
        for name in sorted(results):  # sorted: the order in which threads finish varies
            entries = {suffix.removeprefix("."): content for suffix, content in results[name].items()}
            archive.write({"__key__": name, **entries})
