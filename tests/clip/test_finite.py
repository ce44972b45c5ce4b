"""Weights and text features that are not finite are errors at loading; damaged caches are computed again."""

import hashlib
import io

import numpy as np
import pytest
import torch

import clip
from clip.prompts import encode_prompts, text_features
from tests.clip.test_checkpoint import SMALL_RESNET, SMALL_VIT, small_state

NAN, INF = float("nan"), float("inf")


def changed(tmp_path, key, value, config=SMALL_VIT):
    state = small_state(config)
    state[key].view(-1)[-1] = value
    torch.save(state, tmp_path / "a.pt")
    return tmp_path / "a.pt"


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("key", ["visual.transformer.resblocks.1.ln_1.bias", "ln_final.bias", "logit_scale"])
def test_weight_that_is_not_finite_raises(key, value, tmp_path):
    for rounded in (True, False):
        with pytest.raises(ValueError, match=rf"a\.pt has NaN or infinity in {key}: use another"):
            clip.load(changed(tmp_path, key, value), device="cpu", round_weights=rounded)


def test_weight_that_float16_cannot_represent_raises(tmp_path):
    file = changed(tmp_path, "visual.proj", 7e4)
    with pytest.raises(ValueError, match=r"a\.pt, rounded to float16, has NaN or infinity in visual\.proj"):
        clip.load(file, device="cpu")
    with pytest.raises(ValueError, match=r"in --precision fp16 has NaN or infinity in proj: use --prec"):
        clip.load(file, device="cpu", precision="fp16", round_weights=False)
    assert clip.load(file, device="cpu", round_weights=False).visual.proj.max() == 7e4
    for value in (65504.0, -65504.0):
        clip.load(changed(tmp_path, "visual.proj", value), device="cpu")


def test_float64_beyond_float32_raises(tmp_path):
    state = {key: value.double() for key, value in small_state().items()}
    state["visual.proj"][0, 0] = 1e300
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"NaN or infinity in visual\.proj"):
        clip.load(tmp_path / "a.pt", device="cpu")


def test_values_that_make_all_results_invalid_raise(tmp_path):
    with pytest.raises(ValueError, match=r"variances below 0 in visual\.bn1\.running_var"):
        clip.load(changed(tmp_path, "visual.bn1.running_var", -1, SMALL_RESNET), device="cpu")
    with pytest.raises(ValueError, match="the logit_scale 100, of which the exponential"):
        clip.load(changed(tmp_path, "logit_scale", 100), device="cpu")


def test_towers_without_blocks_or_pixels_and_small_vocabularies_raise(tmp_path):
    state = small_state()
    no_pixels = {**state, "visual.conv1.weight": torch.zeros(64, 3, 0, 0)}
    no_blocks = {key: value for key, value in state.items() if "visual.transformer" not in key}
    words = {**state, "token_embedding.weight": torch.zeros(1000, 64)}
    deep = state | {f"visual.transformer.resblocks.{index}.x": torch.zeros(1) for index in range(2000)}
    for content, fault in (
        (no_pixels, "patches of 0 pixels"),
        (no_blocks, r"has \(0,\) blocks"),
        (deep, r"has \(2000,\) blocks"),
        (words, "vocabulary of 1000 tokens"),
    ):
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(ValueError, match=fault):
            clip.load(tmp_path / "a.pt", device="cpu")


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIP_WSSS_CACHE", str(tmp_path / "cache"))
    torch.save(small_state(), tmp_path / "model.pt")
    return clip.load(tmp_path / "model.pt", device="cpu")


@pytest.mark.parametrize("value", [NAN, 0])
def test_text_features_without_direction_raise(model, value):
    model.text_projection.data.fill_(value)
    with pytest.raises(ValueError, match="the text feature of 'cat' is 0 or not finite"):
        text_features(model, ["cat", "dog"], ["a {}."])


def npy(array, save=np.save) -> bytes:
    stream = io.BytesIO()
    save(stream, array)
    return stream.getvalue()


def with_digest(content: bytes) -> bytes:
    return content + hashlib.sha256(content).digest()


def flipped(content: bytes, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 64]) + content[position + 1 :]


DAMAGES = {
    "empty": lambda content, array: b"",
    "cut": lambda content, array: content[:-1],
    "longer": lambda content, array: content + b"x",
    "page": lambda content, array: b"<html>not found</html>",
    "bit of the array": lambda content, array: flipped(content, 200),
    "bit of the header": lambda content, array: flipped(content, 20),
    "without digest": lambda content, array: npy(array),
    "zeros": lambda content, array: with_digest(npy(np.zeros_like(array))),
    "NaN": lambda content, array: with_digest(npy(array * np.float32("nan"))),
    "not of unit norm": lambda content, array: with_digest(npy(array * np.float32(1.1))),
    "other type": lambda content, array: with_digest(npy(array.astype(np.float64))),
    "text": lambda content, array: with_digest(npy(np.zeros(array.shape, "S3"))),
    "other shape": lambda content, array: with_digest(npy(array[:1])),
    "archive": lambda content, array: with_digest(npy(array, np.savez)),
    "pickle": lambda content, array: with_digest(npy(array.astype(object))),
    "huge": lambda content, array: content + bytes(10**6),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_cache_is_computed_and_written_again(model, tmp_path, damage):
    expected = text_features(model, ["cat", "dog"], ["a {}."])
    assert torch.equal(expected, encode_prompts(model, ["cat", "dog"], ["a {}."]))
    (file,) = (tmp_path / "cache").glob("text-*.npy")
    content = file.read_bytes()
    array = np.load(file)
    np.testing.assert_array_equal(array, expected)
    file.write_bytes(DAMAGES[damage](content, array))
    assert torch.equal(text_features(model, ["cat", "dog"], ["a {}."]), expected)
    assert file.read_bytes() == content


def test_undamaged_cache_is_used(model, monkeypatch):
    expected = text_features(model, ["cat", "dog"], ["a {}."])
    monkeypatch.setattr("clip.prompts.encode_prompts", None)  # a call would fail
    assert torch.equal(text_features(model, ["cat", "dog"], ["a {}."]), expected)


@pytest.mark.parametrize("cache", ["a file", "a folder with the name of the entry", "no home folder"])
def test_features_are_computed_without_a_usable_cache(model, tmp_path, monkeypatch, cache):
    expected = text_features(model, ["cat"], ["a {}."])
    (file,) = (tmp_path / "cache").glob("text-*.npy")
    file.unlink()
    if cache == "a file":
        monkeypatch.setenv("CLIP_WSSS_CACHE", str(tmp_path / "model.pt"))
    elif cache == "no home folder":
        monkeypatch.delenv("CLIP_WSSS_CACHE")
        monkeypatch.setattr("pathlib.Path.home", lambda: exec("raise RuntimeError"))
    else:
        file.mkdir()
    assert torch.equal(text_features(model, ["cat"], ["a {}."]), expected)
