"""Images in tar shards give the same files as images in a folder; damaged and missing shards."""

import bz2
import gzip
import lzma
import re
import sys
import tarfile
import time
import tracemalloc
from importlib import import_module
from io import BytesIO
from pathlib import Path

import pytest

from pipeline.shards import DamagedShard, _samples, shard_files
from segmentation import camfile
from tests.conftest import parity_image
from tests.pipeline.conftest import write_voc

# Image -> size and labels; three to a shard.
IMAGES = {f"image_{index}": ((60 + 4 * index, 90), [index, 19 - index]) for index in range(8)}
NAMES = sorted(IMAGES)
SHARDS = {f"in-{index:03}.tar": NAMES[3 * index : 3 * index + 3] for index in range(3)}


def run(script: str, *arguments, code: int = 0) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, arguments), "--device", "cpu"])
        assert import_module(script).main() == code


def write_shard(file: Path, members: dict[str, bytes]) -> None:
    """Write a shard with webdataset's writer."""
    from webdataset import TarWriter

    with TarWriter(str(file), encoder=False) as archive:
        for name, content in members.items():
            key, suffix = name.rsplit(".", 1)
            archive.write({"__key__": key, suffix: content})


def members(file: Path) -> dict[str, bytes]:
    with tarfile.open(file) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}


def results(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.tar")}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Folder with the same images as files and in shards; the last image is a PNG."""
    root = write_voc(tmp_path_factory.mktemp("voc"), IMAGES)
    content = {}
    for name, (size, labels) in IMAGES.items():
        (root / "JPEGImages" / f"{name}.png").unlink()
        suffix = "png" if name == NAMES[-1] else "jpg"
        file = root / "JPEGImages" / f"{name}.{suffix}"
        parity_image(name, size).save(file)
        content[name] = {f"{name}.cls": " ".join(map(str, labels)).encode(), file.name: file.read_bytes()}
    for shard, names in SHARDS.items():
        write_shard(root / shard, {key: value for name in names for key, value in content[name].items()})
    return root


@pytest.fixture(scope="module")
def model(parity_file) -> list:
    return ["--benchmark", "voc12", "--model", parity_file("tiny", 1)]


@pytest.fixture(scope="module")
def folder(data, model, tmp_path_factory) -> Path:
    """Masks, and CAMs in `cams`, of the images in the folder."""
    out = tmp_path_factory.mktemp("folder") / "masks"
    images = ["--image_root", data / "JPEGImages", "--split_file", data / "split.txt"]
    run("pseudo_masks", *model, *images, "--output", out, "--keep_cams", "compact")
    assert len(list(out.glob("*.png"))) == len(IMAGES)
    return out


@pytest.fixture(scope="module")
def sharded(data, model, tmp_path_factory) -> Path:
    """Masks of the shards."""
    out = tmp_path_factory.mktemp("sharded") / "masks"
    masks(data, model, out)
    return out


def masks(data: Path, model: list, out: Path, *flags, shards="in-{000..002}.tar", code=0) -> dict[str, bytes]:
    """Run pseudo_masks.py on shards; return the result shards."""
    common = ["--shards", data / shards, "--output", out]
    run("pseudo_masks", *model, *common, *flags, code=code)
    return results(out)


def test_masks_equal_those_of_the_folder(folder, sharded):
    assert {file.name for file in sharded.iterdir()} == {*SHARDS, "settings.json"}
    for shard, names in SHARDS.items():
        expected = {f"{name}.png": (folder / f"{name}.png").read_bytes() for name in names}
        assert members(sharded / shard) == expected


@pytest.mark.parametrize("cam_format", camfile.FORMATS)
def test_kept_cams_are_in_the_shards_of_their_masks(cam_format, data, model, folder, tmp_path):
    masks(data, model, tmp_path / "masks", "--keep_cams", cam_format)
    assert not (tmp_path / "masks" / "cams").exists()
    suffix = camfile.FORMATS[cam_format]
    for shard, names in SHARDS.items():
        content = members(tmp_path / "masks" / shard)
        assert set(content) == {f"{name}{end}" for name in names for end in (".png", suffix)}
        for name in names:
            assert content[f"{name}.png"] == (folder / f"{name}.png").read_bytes()
            (tmp_path / f"{name}{suffix}").write_bytes(content[f"{name}{suffix}"])
            ours, theirs = (camfile.read(path, name) for path in (tmp_path, folder / "cams"))
            assert (ours[0] == theirs[0]).all() and (ours[1] == theirs[1]).all()


def test_cams_of_step_1_equal_those_of_the_folder(data, model, folder, tmp_path):
    common = ["--shards", data / "in-{000..002}.tar", "--output", tmp_path / "cams"]
    run("generate_cams", *model, *common, "--cam_format", "compact")
    for shard, names in SHARDS.items():
        expected = {f"{name}.npz": (folder / "cams" / f"{name}.npz").read_bytes() for name in names}
        assert members(tmp_path / "cams" / shard) == expected


def test_a_stopped_run_makes_only_the_missing_shards(data, model, sharded, tmp_path):
    out = tmp_path / "masks"
    first = masks(data, model, out, shards="in-*.tar")
    assert first == results(sharded)
    before = {file: file.stat().st_mtime_ns for file in out.glob("*.tar")}
    masks(data, model, out)
    assert before == {file: file.stat().st_mtime_ns for file in out.glob("*.tar")}
    (out / "in-001.tar").unlink()
    assert masks(data, model, out) == first
    after = {file: file.stat().st_mtime_ns for file in out.glob("*.tar")}
    assert [file.name for file in before if before[file] != after[file]] == ["in-001.tar"]


def test_processes_threads_and_blocks_do_not_change_shards(data, model, sharded, tmp_path):
    assert masks(data, model, tmp_path / "threads", "--threads", 3, "--prefetch", 2) == results(sharded)
    assert masks(data, model, tmp_path / "two", "--num_workers", 2) == results(sharded)


def test_a_file_of_labels_replaces_those_of_the_shards(data, model, sharded, tmp_path):
    file = tmp_path / "labels.txt"
    lines = [" ".join(map(str, [name, *labels])) for name, (_, labels) in IMAGES.items()]
    file.write_text("\n".join(lines))
    bare = tmp_path / "bare"
    bare.mkdir()
    for shard in SHARDS:
        images = {name: value for name, value in members(data / shard).items() if not name.endswith(".cls")}
        write_shard(bare / shard, images)
    first = masks(bare, model, tmp_path / "masks", "--labels", file)
    assert first == results(sharded)
    file.write_text("".join(f"{name} 5\n" for name in IMAGES))
    for shards, out in ((bare, "other"), (data, "another")):  # shards without labels, and with other labels
        other = masks(shards, model, tmp_path / out, "--labels", file)
        for shard, names in SHARDS.items():
            assert members(tmp_path / out / shard).keys() == {f"{name}.png" for name in names}
            assert other[shard] != first[shard]
    assert results(tmp_path / "other") == results(tmp_path / "another")


def test_images_that_fail_are_left_out_of_their_shard(data, model, sharded, tmp_path, capsys):
    content = members(data / "in-000.tar")
    good = NAMES[0]
    whole = content[f"{good}.jpg"]
    long = "long" * 40  # too long for the oldest tar format
    changed = {
        **{f"{good}.{suffix}": content[f"{good}.{suffix}"] for suffix in ("jpg", "cls")},
        "cut.jpg": whole[: len(whole) // 2],
        "cut.cls": b"3",
        "unlabeled.jpg": whole,
        "empty.jpg": whole,
        "empty.cls": b" \n",
        "word.jpg": whole,
        "word.cls": b"cat",
        "high.jpg": whole,
        "high.cls": b"3 20",
        "binary.jpg": whole,
        "binary.cls": b"\xff\xfe",
        "imageless.cls": b"3",
        "imageless.webp": whole,
        "in/a.folder/deep.JPG": whole,
        "in/a.folder/deep.cls": b"0 19",
        f"{long}.jpg": whole,
        f"{long}.cls": b"0 19",
        "__meta__.json": b"{}",
    }
    write(tmp_path / "in-000.tar", changed)
    shards = masks(tmp_path, model, tmp_path / "masks", shards="in-000.tar", code=1)
    expected = members(sharded / "in-000.tar")[f"{good}.png"]
    names = (good, "in/a.folder/deep", long)
    assert members(tmp_path / "masks" / "in-000.tar") == {f"{name}.png": expected for name in names}
    printed = capsys.readouterr().err
    assert "images without labels: 1 (empty)" in printed and "10 images, 5 failed" in printed
    assert "samples without an image: 1 (imageless)" in printed
    failures = dict(
        line.split("\t") for line in (tmp_path / "masks" / "failed.txt").read_text().splitlines()
    )
    assert failures.keys() == {"cut", "unlabeled", "word", "high", "binary"}
    assert failures["cut"].startswith("image cut cannot be read")
    assert failures["unlabeled"] == (
        "unlabeled has no labels: add unlabeled.cls to its shard, or give --labels FILE"
    )
    cure = "expected class indices 0..19, separated by spaces"
    assert failures["word"] == f"word.cls contains 'cat': {cure}"
    assert failures["high"] == f"high.cls contains '3 20': {cure}"
    assert shards.keys() == {"in-000.tar"}


def write(file: Path, content: dict[str, bytes]) -> None:
    """Write a shard with tarfile, which allows names of any length."""
    with tarfile.open(file, "w") as archive:
        for name, value in content.items():
            member = tarfile.TarInfo(name)
            member.size = len(value)
            archive.addfile(member, BytesIO(value))


@pytest.fixture
def copies(data, tmp_path) -> Path:
    (tmp_path / "copies").mkdir()
    for shard in SHARDS:
        (tmp_path / "copies" / shard).write_bytes((data / shard).read_bytes())
    return tmp_path / "copies"


def third_header(content: bytes) -> int:
    """Return the offset of the third member of an archive."""
    with tarfile.open(fileobj=BytesIO(content)) as archive:
        return archive.getmembers()[2].offset


DAMAGES = {
    "in an image": lambda content: content[: len(content) // 2],
    "between images": lambda content: content[: third_header(content)],
    "in a header": lambda content: content[: third_header(content) + 100],
    "a header overwritten": lambda content: content[: third_header(content)]
    + b"\xaa" * 512
    + content[third_header(content) + 512 :],
    "an image twice": lambda content: content[: third_header(content)] + content,
    "empty": lambda content: b"",
    "no archive": lambda content: b"<html>no such file</html>" * 100,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_fails_alone(damage, copies, model, sharded, tmp_path, capsys):
    shard = copies / "in-001.tar"
    whole = shard.read_bytes()
    shard.write_bytes(DAMAGES[damage](whole))
    shards = masks(copies, model, tmp_path / "masks", code=1)
    assert shards == {name: value for name, value in results(sharded).items() if name != shard.name}
    assert f"failed: {shard}: shard {shard} cannot be read: " in capsys.readouterr().err
    failures = (tmp_path / "masks" / "failed.txt").read_text().splitlines()
    assert len(failures) == 1 and len(failures[0]) < 500
    shard.write_bytes(whole)
    assert masks(copies, model, tmp_path / "masks") == results(sharded)
    assert not (tmp_path / "masks" / "failed.txt").exists()


def test_compressed_and_piped_shards_are_read(data, model, sharded, tmp_path):
    packed = tmp_path / "packed"
    packed.mkdir()
    (packed / "in-000.tar.gz").write_bytes(gzip.compress((data / "in-000.tar").read_bytes()))
    shards = masks(packed, model, tmp_path / "unpacked", shards="*.tar.gz")
    assert shards == {"in-000.tar": results(sharded)["in-000.tar"]}
    for shard in ("in-001.tar", "in-002.tar"):  # padding after the archive
        (packed / shard).write_bytes((data / shard).read_bytes() + bytes(2**19))
    command = f"pipe:cat {packed}/in-{{001..002}}.tar || exit 23"  # fails unless read to its end, like curl
    common = ["--shards", command, "--output", tmp_path / "p"]
    run("pseudo_masks", *model, *common)
    shards = results(tmp_path / "p")
    assert shards == {name: value for name, value in results(sharded).items() if name != "in-000.tar"}
    with pytest.raises(ValueError, match=r"contains no name of a \.tar file"):
        shard_files("pipe:cat images")
    assert shard_files("pipe:cp s3://bucket/a.tar - | tee b") == ["pipe:cp s3://bucket/a.tar - | tee b"]


def test_a_failing_command_of_a_pipe_fails_its_shard(model, tmp_path):
    common = ["--shards", "pipe:cat /nowhere/in-000.tar", "--output", tmp_path / "masks"]
    run("pseudo_masks", *model, *common, code=1)
    assert not results(tmp_path / "masks") and "in-000.tar" in (tmp_path / "masks" / "failed.txt").read_text()


@pytest.mark.parametrize(
    "pattern, message",
    [
        ("in-{000..003}.tar", "in-003.tar does not exist"),
        ("other-*.tar", r"other-\*.tar does not exist"),
        (
            "{in-000,JPEGImages/../in-000}.tar",
            "--shards: two shards and their results have the name in-000.tar: rename one",
        ),
    ],
)
def test_missing_and_repeated_shards_are_usage_errors(pattern, message, data, model, tmp_path):
    with pytest.raises((ValueError, OSError), match=message):
        masks(data, model, tmp_path / "masks", shards=pattern)
    assert not (tmp_path / "masks").exists()


def test_folders_of_files_and_of_shards_are_not_mixed(data, model, folder, sharded, tmp_path):
    before = (folder / "settings.json").read_bytes()
    with pytest.raises(ValueError, match="other settings"):
        masks(data, model, folder)
    with pytest.raises(ValueError, match="other settings"):
        images = ["--image_root", data / "JPEGImages", "--split_file", data / "split.txt"]
        run("pseudo_masks", *model, *images, "--output", sharded)
    with pytest.raises(ValueError, match="other settings"):
        common = ["--shards", data / "in-*.tar", "--output", folder / "cams"]
        run("generate_cams", *model, *common, "--cam_format", "compact")
    assert (folder / "settings.json").read_bytes() == before


def test_an_image_without_labels_removes_no_file_of_another_folder(data, model, folder, tmp_path):
    image = members(data / "in-000.tar")["image_0.jpg"]
    write_shard(tmp_path / "in.tar", {"image_0.jpg": image, "image_0.cls": b""})
    mine = tmp_path / "cams" / "image_0.npz"
    mine.parent.mkdir()
    mine.write_bytes((folder / "cams" / "image_0.npz").read_bytes())
    for flags in (["--keep_cams", "compact"], []):
        with pytest.raises(SystemExit):
            masks(tmp_path, model, tmp_path / "masks", "--cam_dir", mine.parent, *flags, shards="in.tar")
    assert mine.is_file()


def test_failures_of_a_shard_are_listed_until_it_is_removed(copies, model, tmp_path, capsys):
    """An existing result shard is not made again, so the run keeps reporting its failed images."""
    out, good = tmp_path / "masks", members(copies / "in-001.tar")
    write_shard(copies / "in-001.tar", {**good, "image_4.jpg": b"no image"})
    for _ in range(2):
        first = masks(copies, model, out, code=1)
        printed = capsys.readouterr().err
        assert "1 failed" in printed and "is not an image" in printed
        assert "remove a result shard to try its images" in printed
        assert (out / "failed.txt").read_text() == (out / "in-001.failed.txt").read_text()
    write_shard(copies / "in-001.tar", good)
    (out / "in-001.tar").unlink()
    assert masks(copies, model, out).keys() == first.keys()
    assert not list(out.glob("*failed.txt")) and "image_4.png" in members(out / "in-001.tar")


def test_result_shards_record_whether_cams_are_kept(data, model, sharded, tmp_path):
    with pytest.raises(ValueError, match="keep_cams"):
        masks(data, model, sharded, "--keep_cams", "compact")


def test_a_shard_with_a_repeated_image_fails(copies, model, tmp_path, capsys):
    content = members(copies / "in-000.tar")
    names = sorted(content)
    with tarfile.open(copies / "in-000.tar", "w") as archive:
        for name in [*names, *names[:2]]:
            info = tarfile.TarInfo(name)
            info.size = len(content[name])
            archive.addfile(info, BytesIO(content[name]))
    assert "in-000.tar" not in masks(copies, model, tmp_path / "masks", code=1)
    assert "image_0 twice" in capsys.readouterr().err


def test_shards_exclude_the_flags_of_image_folders(data, model, tmp_path, capsys):
    with pytest.raises(SystemExit):
        masks(data, model, tmp_path / "masks", "--split_file", data / "split.txt")
    assert "--shards" in capsys.readouterr().err


# Shards of other origin


def archive(*entries: tuple, **options) -> bytes:
    """Return a tar archive of entries (name, content, further attributes of the member)."""
    stream = BytesIO()
    with tarfile.open(fileobj=stream, mode="w", **options) as tar:
        for name, content, *attributes in entries:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for attribute, value in attributes[0].items() if attributes else ():
                setattr(member, attribute, value)
            tar.addfile(member, BytesIO(content) if member.isreg() else None)
    return stream.getvalue()


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """Return the header of a member that declares a size."""
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


def pair(key: str) -> list[tuple[str, bytes]]:
    return [(f"{key}.jpg", b"image"), (f"{key}.cls", b"0")]


def samples(folder: Path, content: bytes) -> list:
    (folder / "s.tar").write_bytes(content)
    return [*_samples(str(folder / "s.tar"))]


HARD_LINK = {"type": tarfile.LNKTYPE, "linkname": "x.jpg"}
SYMLINK = {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}
DOT = "a key ends at its first dot"


@pytest.mark.parametrize(
    "entries, faults",
    [
        ([("x.rf.1a2b.jpg", b""), ("x.rf.1a2b.cls", b"0")], {"x": rf"x\.rf\.1a2b\.jpg: {DOT}"}),
        ([*pair("x.2"), *pair("x.3"), *pair("y")], {"x": rf"x\.2\.jpg: {DOT}", "y": ""}),
        ([("x.2.jpg", b"")], {"x": DOT}),  # labels in a file
        ([("x.jpg", b""), ("x.cls", b""), *pair("x.2")], {"x": rf"x\.2\.jpg: {DOT}"}),
        ([("x.jpg", b""), ("x.2.cls", b"")], {"x": rf"x\.2\.cls: {DOT}"}),
        ([("x.jpg", b""), ("x.seg.png", b""), ("x.cls", b"0"), ("x.a.json", b"")], {"x": ""}),
        ([*pair("/x"), *pair("C:\\x")], {"/x": "is an absolute path", "C:\\\\x": "is an absolute path"}),
        ([*pair("../x"), *pair("a/../../x")], {"../x": "contains `..`", "a/../../x": "contains `..`"}),
        ([*pair("caf\udce9"), *pair("x\n")], {r"caf\udce9": "not UTF-8", r"x\n": "control character"}),
        ([*pair("./x"), *pair("a.b/y"), *pair("a b")], {"x": "", "a.b/y": "", "a b": ""}),
        ([("x.jpg", b"", SYMLINK), ("x.cls", b"0"), ("y.txt", b"", SYMLINK)], {"x": "is a link", "y": ""}),
        ([*pair("x"), ("y.jpg", b"", HARD_LINK)], {"x": "", "y": "is a link"}),
        ([("x.jpg", b"", {"type": tarfile.CHRTYPE})], {"x": "is a link, a device or a sparse file"}),
        ([("x.jpg", b"", {"type": tarfile.FIFOTYPE})], {"x": "is a link, a device or a sparse file"}),
        ([("x.jpg", b"", {"type": tarfile.DIRTYPE}), *pair("y")], {"y": ""}),
        ([("x.cls", bytes(2**16 + 1))], {"x": "x.cls has 65537 bytes, more than the 65536 that are read"}),
        (
            [("x.jpg", b"", {"pax_headers": {"GNU.sparse.map": "0,1", "GNU.sparse.size": str(2**40)}})],
            {"x": "is a link, a device or a sparse file"},
        ),
    ],
)
def test_sample_that_cannot_be_used_is_a_failure_with_its_reason(tmp_path, entries, faults):
    content = archive(*entries, errors="surrogateescape")
    found = {sample.name: sample.fault for sample in samples(tmp_path, content)}
    assert found.keys() == faults.keys()
    for name, fault in faults.items():
        assert re.search(fault, found[name]) if fault else not found[name]
        found[name].encode()


@pytest.mark.parametrize("labels", ["3.0", "-1", "0,3", "[0, 3]", "\u0663", "9" * 5000, "cat"])
def test_labels_that_are_no_class_indices_fail_the_image(copies, model, tmp_path, labels):
    content = members(copies / "in-000.tar")
    write(copies / "in-000.tar", {**content, "image_1.cls": labels.encode()})
    masks(copies, model, tmp_path / "masks", shards="in-000.tar", code=1)
    line = (tmp_path / "masks" / "failed.txt").read_text()
    assert line.startswith("image_1\timage_1.cls contains '") and len(line) < 250
    assert "expected class indices 0..19, separated by spaces" in line
    assert members(tmp_path / "masks" / "in-000.tar").keys() == {"image_0.png", "image_2.png"}


def test_keys_with_dots_are_failures_of_the_run(copies, model, tmp_path, capsys):
    content = members(copies / "in-000.tar")
    names = {name: name.replace("image_1", "image.1") for name in content}
    write(copies / "in-000.tar", {names[name]: value for name, value in content.items()})
    masks(copies, model, tmp_path / "masks", shards="in-000.tar", code=1)
    assert f"failed: image: image.1.cls: {DOT}" in capsys.readouterr().err


def bomb(unpack, name: str, megabytes: int) -> bytes:
    """Return a compressed archive of one member that contains zeros."""
    stream = BytesIO()
    with unpack(stream, "wb") as packed:
        packed.write(header(name, megabytes * 2**20))
        for _ in range(megabytes):
            packed.write(bytes(2**20))
    return stream.getvalue()


HOSTILE = {
    "size": lambda: header("x.jpg", 2**40) + bytes(512),
    "size of another file": lambda: header("x.npy", 2**40) + bytes(512),
    "labels": lambda: header("x.cls", 2**31) + bytes(512),
    "negative size": lambda: header("x.jpg", -512) + archive(*pair("x")),
    "pax size": lambda: archive(("x.jpg", b"", {"pax_headers": {"size": "9" * 25}})),
    "negative pax size": lambda: archive(("x.jpg", b"", {"pax_headers": {"size": "-5"}})),
    "pax header": lambda: header("x", 2**40, tarfile.XHDTYPE) + bytes(512),
    "long name": lambda: header("x", 2**40, tarfile.GNUTYPE_LONGNAME) + bytes(512),
    "long names": lambda: (header("x", 2, tarfile.GNUTYPE_LONGNAME) + b"y".ljust(512, b"\0")) * 3000,
    "sparse": lambda: header("x.jpg", 2**33, tarfile.GNUTYPE_SPARSE) + bytes(100),
    "sparse pax": lambda: archive(
        ("x.jpg", b"x" * 600, {"pax_headers": {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}})
    ),
    "gzip": lambda: bomb(gzip.open, "x.jpg", 200),
    "gzip of another file": lambda: bomb(gzip.open, "x.npy", 200),
    "bzip2": lambda: bomb(bz2.open, "x.npy", 80),
    "xz": lambda: bomb(lzma.open, "x.npy", 100),
    "pax in gzip": lambda: gzip.compress(header("x", 2**31, tarfile.XHDTYPE) + bytes(2**27)),
    "cut gzip": lambda: gzip.compress(archive(*pair("x")))[:-9],
    "checksum of gzip": lambda: gzip.compress(archive(*pair("x")))[:-8] + bytes(8),
    "files apart": lambda: archive(pair("x")[0], *pair("y"), pair("x")[1]),
    "image twice": lambda: archive(("x.jpg", b""), ("x.JPG", b"")),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_shard_is_refused_in_little_time_and_memory(tmp_path, case):
    content = HOSTILE[case]()
    start = time.monotonic()
    tracemalloc.start()
    try:
        with pytest.raises(DamagedShard, match=r"shard .*s\.tar cannot be read: .") as error:
            samples(tmp_path, content)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert peak < 2**28 and time.monotonic() - start < 5


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_shards_have_the_same_samples(tmp_path, pack):
    plain = archive(*pair("x"), *pair("y"))
    assert samples(tmp_path, pack(plain)) == samples(tmp_path, plain) and len(samples(tmp_path, plain)) == 2


RESULT_DAMAGES = {
    "in a mask": lambda content: content[:600] + bytes([content[600] ^ 1]) + content[601:],
    "cut in a mask": lambda content: content[:700],
    "cut between masks": lambda content: content[: third_header(content)],
    "without end": lambda content: content.rstrip(b"\0"),
    "zeros": lambda content: bytes(len(content)),
    "empty": lambda content: b"",
    "no archive": lambda content: b"<html>no such file</html>" * 100,
}


@pytest.mark.parametrize("damage", RESULT_DAMAGES)
def test_damaged_result_shard_is_made_again(damage, data, model, sharded, tmp_path):
    for shard in SHARDS:
        (tmp_path / shard).write_bytes((sharded / shard).read_bytes())
    (tmp_path / "settings.json").write_bytes((sharded / "settings.json").read_bytes())
    whole = (tmp_path / "in-001.tar").read_bytes()
    (tmp_path / "in-001.tar").write_bytes(RESULT_DAMAGES[damage](whole))
    assert masks(data, model, tmp_path) == results(sharded)


def test_damaged_cam_in_a_result_shard_is_made_again(data, model, tmp_path):
    first = masks(data, model, tmp_path, "--keep_cams", "compact")
    content = bytearray(first["in-000.tar"])
    with tarfile.open(tmp_path / "in-000.tar") as tar:
        member = next(member for member in tar if member.name.endswith(".npz"))
    content[member.offset_data + member.size // 2] ^= 1
    (tmp_path / "in-000.tar").write_bytes(content)
    assert masks(data, model, tmp_path, "--keep_cams", "compact") == first


def test_damaged_list_of_failures_counts_as_failures(copies, model, tmp_path, capsys):
    out = tmp_path / "masks"
    masks(copies, model, out, shards="in-000.tar")
    (out / "in-000.failed.txt").write_bytes(b"caf\xe9\n\nx\tno image\n")
    masks(copies, model, out, shards="in-000.tar", code=1)
    printed = capsys.readouterr().err
    assert "failed: caf\\xe9: it is listed in" in printed and "failed: x: no image" in printed


def test_result_shard_that_cannot_be_written_fails_alone(data, model, sharded, tmp_path, capsys):
    masks(data, model, tmp_path, shards="in-{001..002}.tar")
    (tmp_path / "in-000.tar").mkdir()
    (tmp_path / "in-002.tar").unlink()
    run("pseudo_masks", *model, "--shards", data / "in-*.tar", "--output", tmp_path, code=1)
    assert "in-000.tar cannot be written (Is a directory)" in capsys.readouterr().err
    assert (tmp_path / "in-002.tar").read_bytes() == (sharded / "in-002.tar").read_bytes()
