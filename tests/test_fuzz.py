"""Generated files for every reader: no traceback, no hang, no large allocation, and no invalid result.

The number of examples per reader is CLIP_WSSS_FUZZ (default 40), for example:
    CLIP_WSSS_FUZZ=5000 python -m pytest tests/test_fuzz.py
"""

import gzip
import io
import json
import os
import pickle
import resource
import tarfile
import time
import unicodedata
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import clip
from coco14.masks import paint
from deeplab import checkpoint
from deeplab.config import Config
from foundation.logs import log
from pipeline import shards
from pipeline.label_scores import read_scores, write_scores
from pipeline.run import read_settings
from segmentation import benchmark, camfile
from segmentation.images import read_image, read_size
from segmentation.labels import from_coco_json, read_coco_json, read_split, read_voc_xml
from segmentation.masks import encode_mask, is_complete, mask_class_ids, read_mask
from tests.conftest import parity_state
from training import config as configs

EXAMPLES = int(os.environ.get("CLIP_WSSS_FUZZ", 40))
MAX_SECONDS = 5  # for one file
MAX_BYTES = 2**30  # growth of the resident memory during all examples of a reader
# Bytes and words that often matter to parsers.
TOKENS = [
    b"\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\n", b"\r\n", b"\t", b" ", b"..", b"/", b"\\", b"-1",
    b"0", b"1e999", b"NaN", b"Infinity", b"null", b"99999999999999999999", b"2147483648", b"[", b"]", b"{",
    b"}", b'"', b"'", b"&a ", b"*a", b"!!python/object:os.system", b"<", b">", b"&lol;",
    b"\xc3", b"\xed\xa0\x80",
    b"\xef\xbb\xbf", b"x.jpg", b"%s", b"${a}", b"#", b":", b",",
]  # fmt: skip


@st.composite
def damaged(draw, contents: list[bytes]) -> bytes:
    """Draw a content with up to eight changes: bits, missing, repeated and inserted parts."""
    data = bytearray(draw(st.sampled_from(contents)))
    for _ in range(draw(st.integers(0, 8))):
        start = draw(st.integers(0, max(0, len(data))))
        end = min(len(data), start + draw(st.integers(0, 40)))
        kind = draw(st.sampled_from(["flip", "delete", "repeat", "insert", "replace", "cut"]))
        if kind == "flip" and start < len(data):
            data[start] ^= 1 << draw(st.integers(0, 7))
        elif kind == "delete":
            del data[start:end]
        elif kind == "repeat":
            data[start:start] = data[start:end] * draw(st.integers(1, 5))
        elif kind in ("insert", "replace"):
            token = draw(st.sampled_from(TOKENS) | st.binary(max_size=6))
            data[start : end if kind == "replace" else start] = token
        elif kind == "cut":
            del data[start:]
    return bytes(data)


def saved(save: Callable, *arguments, **options) -> bytes:
    stream = io.BytesIO()
    save(stream, *arguments, **options)
    return stream.getvalue()


# Contents of valid files


def images() -> list[bytes]:
    pixels = np.random.default_rng(0).integers(0, 255, (9, 12, 3)).astype(np.uint8)
    contents = []
    kinds = [("RGB", "JPEG"), ("RGB", "PNG"), ("L", "PNG"), ("P", "PNG"), ("RGBA", "PNG"), ("RGB", "GIF")]
    for mode, kind in kinds:
        image = Image.fromarray(pixels).convert(mode)
        contents.append(saved(lambda stream, image=image, kind=kind: image.save(stream, kind)))
    return contents


def masks() -> list[bytes]:
    labels = np.arange(108, dtype=np.uint8).reshape(9, 12) % 4
    gray = Image.fromarray(labels)
    return [
        encode_mask(labels, benchmark.voc_palette(), [0, 2]),
        saved(lambda stream: gray.save(stream, "PNG")),
        saved(lambda stream: gray.save(stream, "PNG", bits=4)),
    ]


def cam_files() -> dict[str, list[bytes]]:
    grid = {"attn_highres": np.random.default_rng(0).random((2, 3, 4), np.float32)}
    pickled = {"keys": np.array([0, 2]), "attn_highres": np.zeros((2, 5, 6), np.float16)}
    header = saved(np.save, np.array({}, object), allow_pickle=True)
    start = header.index(b"\n") + 1
    full = [camfile.encode([0, 2], grid, (9, 12), "full")]
    full += [header[:start] + pickle.dumps(np.array(pickled, object), number) for number in range(5)]
    arrays = {"keys": np.array([1]), "size": np.array([9, 12]), "attn_highres": np.zeros((1, 2, 2))}
    compressed = saved(np.savez_compressed, **arrays)
    return {".npy": full, ".npz": [camfile.encode([0, 2], grid, (9, 12), "compact"), compressed]}


def instances() -> bytes:
    square = [[0, 0, 4, 0, 4, 4, 0, 4]]
    return json.dumps({
        "images": [{"id": 1, "file_name": "a.jpg", "height": 8, "width": 10},
                   {"id": 2, "file_name": "d/b.jpg", "height": 8, "width": 10}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 2, "segmentation": square, "bbox": [0, 0, 4, 4]},
            {"id": 2, "image_id": 2, "category_id": 1, "iscrowd": 1,
             "segmentation": {"size": [8, 10], "counts": [0, 16, 64]}},
            {"id": 3, "image_id": 2, "category_id": 3, "segmentation": {"size": [8, 10], "counts": "0@@0"}},
        ],
        "categories": [{"id": 1, "name": "oak"}, {"id": 2, "name": "maple"}, {"id": 3, "name": "birch"}],
    }).encode()  # fmt: skip


XML = b"""<annotation><size><width>12</width><height>9</height></size>
<object><name>dog</name><part><name>head</name></part></object><object><name>cat</name></object></annotation>"""
YAML = b"""name: own
classes: [oak, maple, 'birch']
backgrounds:
  - ground
  - sky
templates: ["a photo of a {}."]
box_threshold: 0.4
has_background: true
labels: file
category_ids: [1, 2, 3]
"""
RECORD = b'{"step": "cams", "settings": {"a": 1}, "inputs": {}}'
CONFIG = b"""data: {benchmark: voc12, root: a}
solver:
  learning_rate: 2e-4
  iterations: 20
test: {scales: [0.5, 1], flip: true, crf: null}
model: {blocks: [1, 1, 1, 1], width: 16}
"""


def shard() -> list[bytes]:
    def tar(stream, mode):
        with tarfile.open(fileobj=stream, mode=mode) as archive:
            jpeg, png, *_ = images()
            for name, content in (("a.jpg", jpeg), ("a.cls", b"0 2"), ("b.png", png), ("b.cls", b"1")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))

    return [saved(tar, "w"), saved(tar, "w:gz")]


@cache
def tiny_clip() -> clip.CLIP:
    return clip.checkpoint.from_state_dict(parity_state("tiny", 1)).eval()


def checkpoints() -> list[bytes]:
    from safetensors.torch import save

    state = {"base.fc.weight": torch.ones(2, 3), "base.fc.bias": torch.zeros(2), "steps": torch.tensor(3)}
    legacy = saved(lambda stream: torch.save(state, stream, _use_new_zipfile_serialization=False))
    return [saved(lambda stream: torch.save({"state_dict": state}, stream)), legacy, save(state)]


# Readers: each raises ValueError or OSError, or returns a valid result


def check_split(file: Path) -> None:
    for name, labels in read_split(file, 20).items():
        path = PurePosixPath(name)
        assert not path.is_absolute() and ".." not in path.parts, name
        assert not any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name), name
        assert all(0 <= label < 20 for label in labels)


def check_xml(file: Path) -> None:
    annotation = read_voc_xml(file)
    assert all(name and name == name.strip() for name in annotation.names)


def check_instances(file: Path) -> None:
    classes = ["oak", "maple", "birch"]
    read = from_coco_json(file, classes)
    for name, image in read_coco_json(file, classes).images.items():
        if image.size is None:
            continue
        try:
            assert all(0 <= label < 3 for label in read(name))
            mask = paint(image)
        except ValueError:  # a fault of this image
            continue
        assert mask.shape == image.size and mask.max(initial=0) <= 80


def check_mask(file: Path) -> None:
    complete, class_ids = is_complete(file), mask_class_ids(file)
    assert class_ids is None or all(isinstance(class_id, int) for class_id in class_ids)
    mask = read_mask(file)
    assert mask.dtype == np.uint8 and mask.ndim == 2
    assert not complete or mask.size


def check_image(file: Path) -> None:
    size = read_size(file)
    assert read_image(file).size == size[::-1]


def check_cams(file: Path) -> None:
    class_ids, cams = camfile.read(file.parent, file.stem)
    assert camfile.class_ids_of(file.parent, file.stem) == class_ids.tolist()
    assert cams.shape[0] == len(class_ids) and np.isfinite(cams).all() and (class_ids >= 0).all()


def check_yaml(file: Path) -> None:
    read = benchmark.load(str(file))
    assert read.classes and all(isinstance(name, str) and name.strip() for name in read.classes)


def check_config(file: Path) -> None:
    configs.to_yaml(configs.read(Config, file))


def check_shard(file: Path) -> None:
    for sample in shards._samples(str(file)):
        assert "/" not in sample.name or ".." not in sample.name.split("/")


def check_text_features(file: Path) -> None:
    model = tiny_clip()
    os.environ["CLIP_WSSS_CACHE"] = str(file.parent)
    expected = clip.encode_prompts(model, ["dog", "cat"], ["a {}."])
    read = clip.text_features(model, ["dog", "cat"], ["a {}."])
    assert torch.equal(read, expected)


def check_checkpoint(file: Path) -> None:
    for tensor in clip.checkpoint.read_state(file).values():
        assert not isinstance(tensor, torch.Tensor) or tensor.numel() < 2**20
    checkpoint.read(file)


def check_scores(file: Path) -> None:
    for scores in read_scores(file.parent, 3).values():
        assert scores.shape == (3,) and np.isfinite(scores).all()


def check_record(file: Path) -> None:
    assert all(isinstance(read_settings(file.parent).get(part, {}), dict) for part in ("settings", "inputs"))


def text_cache() -> list[bytes]:
    folder = Path(os.environ["CLIP_WSSS_CACHE"])
    clip.text_features(tiny_clip(), ["dog", "cat"], ["a {}."])
    (file,) = folder.glob("text-*.npy")
    return [file.read_bytes()]


# Reader -> name of the file, contents, check.
READERS: dict[str, tuple[str, Callable[[], list[bytes]], Callable[[Path], None]]] = {
    "split": ("split.txt", lambda: [b"a 0 1\nb/c 2\r\n\nd\n", b"\xef\xbb\xbfa 0\n"], check_split),
    "voc xml": ("a.xml", lambda: [XML, gzip.compress(XML)], check_xml),
    "coco json": ("a.json", lambda: [instances()], check_instances),
    "benchmark yaml": ("a.yaml", lambda: [YAML], check_yaml),
    "configuration": ("config.yaml", lambda: [CONFIG], check_config),
    "mask": ("a.png", masks, check_mask),
    "image": ("a.jpg", images, check_image),
    "full CAMs": ("a.npy", lambda: cam_files()[".npy"], check_cams),
    "compact CAMs": ("a.npz", lambda: cam_files()[".npz"], check_cams),
    "shard": ("a.tar", shard, check_shard),
    "checkpoint": ("a.pt", checkpoints, check_checkpoint),
    "settings.json": ("settings.json", lambda: [RECORD], check_record),
}


@pytest.mark.parametrize("reader", READERS)
def test_generated_files_give_a_valid_result_or_a_short_error(reader, tmp_path):
    name, contents, check = READERS[reader]
    file = tmp_path / name
    contents = contents()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    log.setLevel(100)

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(damaged(contents))
    def fuzz(content: bytes) -> None:
        file.write_bytes(content)
        start = time.monotonic()
        try:
            check(file)
        except (ValueError, OSError) as error:
            assert str(error) and "\n" not in str(error).strip(), str(error)
        assert time.monotonic() - start < MAX_SECONDS

    for content in contents:  # the files themselves are valid
        file.write_bytes(content)
        try:
            check(file)
        except (ValueError, OSError):
            assert reader in ("voc xml", "checkpoint")  # gzip, and tensors of no network
    fuzz()
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert grown < MAX_BYTES, f"{grown >> 20} MB"


def test_damaged_caches_and_score_files_never_change_a_result(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIP_WSSS_CACHE", str(tmp_path / "cache"))
    (content,) = text_cache()
    (cache_file,) = (tmp_path / "cache").glob("text-*.npy")
    values = {"a": np.arange(3, dtype=np.float32), "b": np.ones(3, np.float32)}
    scores = write_scores(tmp_path / "scores", values)
    log.setLevel(100)

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(damaged([content]), damaged([scores.read_bytes()]))
    def fuzz(cached: bytes, scored: bytes) -> None:
        cache_file.write_bytes(cached)
        check_text_features(cache_file)
        scores.write_bytes(scored)
        try:
            check_scores(scores)
        except (ValueError, OSError) as error:
            assert "\n" not in str(error)

    fuzz()


def test_zip_members_that_overlap_or_repeat_are_read_once(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        for _ in range(2):
            with pytest.warns(UserWarning) if archive.namelist() else open(os.devnull):
                archive.writestr("keys.npy", saved(np.save, np.array([1])))
    with pytest.raises(ValueError):
        camfile.read(tmp_path, "a")


