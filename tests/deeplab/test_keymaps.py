"""Names of other projects -> ours, against the published converters; values changed by the conversion."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from deeplab.keymaps import (
    bgr_stem,
    caffe,
    caffe_layer,
    family_of,
    mxnet_key,
    own_key,
    rename,
    torchvision_key,
)
from tests.deeplab.common import golden

KEYS = golden("state_dict_keys.json")
NET_A = KEYS["deeplabv2_resnet101_msc_21"]
NET_B = KEYS["deeplabv1_resnet38_21"]


def without_counters(keys) -> set[str]:
    return {key for key in keys if not key.endswith("num_batches_tracked")}


def backbone(keys, prefix: str) -> set[str]:
    return {key for key in without_counters(keys) if key.startswith(prefix)}


@pytest.mark.parametrize("prefix", ["", "base.", "module.", "module.base.", "_orig_mod.base.", "model.base."])
def test_own_key_removes_prefixes_of_network_a(prefix):
    bare = [key.removeprefix("base.") for key in NET_A]
    assert [own_key(prefix + key) for key in bare] == list(NET_A)
    head = KEYS["deeplabv1_resnet101_91_fc_only"]
    assert [own_key(prefix + key) for key in head] == [f"base.{key}" for key in head]


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_own_key_removes_prefixes_of_network_b(prefix):
    assert [own_key(prefix + key) for key in NET_B] == list(NET_B)
    bare = [key.removeprefix("backbone.") for key in NET_B]
    assert [own_key(prefix + key) for key in bare] == list(NET_B)


def test_own_key_is_none_for_other_names():
    foreign = ("fc8.weight", "f9.weight", "conv1.weight", "layer6.x", "bn8.bias")
    assert {own_key(key) for key in foreign} == {None}


def test_torchvision_keys_match_the_published_table():
    table = KEYS["torchvision_resnet101_to_base"]
    names = []
    for key, name in table.items():
        leaves = ["weight"]
        if torchvision_key(key).endswith("bn.weight"):
            leaves += ["bias", "running_mean", "running_var", "num_batches_tracked"]
        for leaf in leaves:
            names.append(torchvision_key(key.replace("weight", leaf)))
            assert names[-1] == f"base.{name}".replace("weight", leaf)
    assert set(names) == {key for key in NET_A if key.startswith("base.layer")}
    assert torchvision_key("fc.weight") is torchvision_key("fc.bias") is None


def test_caffe_layers_match_the_published_table():
    table = dict(KEYS["caffe_layer_to_module_head_base"])
    assert caffe_layer("pool1") is None and table.pop("pool1")  # a layer without tensors
    assert {layer: caffe_layer(layer) for layer in table} == table
    for layer, module in table.items():
        if layer.startswith("bn"):
            assert caffe_layer(layer.replace("bn", "scale", 1)) == module
    modules = {key.rpartition(".")[0] for key in NET_A}
    assert modules < set(table.values())  # the table also has the head of the COCO file
    assert caffe_layer("fc1000") is caffe_layer("prob") is caffe_layer("res6a_branch1") is None


def test_caffe_blocks_are_named_by_letters_or_numbers():
    letters = ["res4a", "res4b", "res4c", "res4d", "res4e", "res4f"]
    numbers = ["res4a", "res4b1", "res4b2", "res4b3", "res4b4", "res4b5"]
    expected = [f"base.layer4.block{block}.reduce.conv" for block in range(1, 7)]
    assert [caffe_layer(f"{layer}_branch2a") for layer in letters] == expected
    assert [caffe_layer(f"{layer}_branch2a") for layer in numbers] == expected


def test_mxnet_keys_match_the_published_table():
    table = {key: name and f"backbone.{name}" for key, name in KEYS["mxnet_to_backbone"].items()}
    assert {key: mxnet_key(key) for key in table} == table
    for prefix in ("arg:", "aux:"):  # prefixes of mxnet.nd.load
        assert [mxnet_key(prefix + key) for key in table] == [*table.values()]
    assert {*table.values()} - {None} == backbone(NET_B, "backbone.")
    assert mxnet_key("res4b12_branch2b1_weight") == "backbone.b4_12.conv_branch2b1.weight"


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        (NET_A, "deeplab-pytorch"),
        ([key.removeprefix("base.") for key in NET_A], "deeplab-pytorch"),
        (NET_B, "resnet38d"),
        ([key.removeprefix("backbone.") for key in NET_B], "resnet38d"),
        (KEYS["torchvision_resnet101_to_base"], "torchvision"),
        ([f"module.{key}" for key in KEYS["torchvision_resnet101_to_base"]], "torchvision"),
        ([f"{key}/0" for key in KEYS["caffe_layer_to_module_head_base"]], "caffe"),
        (KEYS["mxnet_to_backbone"], "mxnet"),
        ([f"arg:{key}" for key in KEYS["mxnet_to_backbone"]], "mxnet"),
        (["visual.conv1.weight", "visual.layer1.0.conv1.weight"], None),  # keys of a CLIP
        ([], None),
    ],
)
def test_family_is_found_by_keys(keys, name):
    family = family_of(dict.fromkeys(keys))
    assert (family and family.name) == name


def test_rename_returns_dropped_keys():
    renamed, dropped = rename({"a": np.ones(2), "b": torch.zeros(1)}, {"a": "x"}.get)
    assert list(renamed) == ["x"] and torch.equal(renamed["x"], torch.ones(2, dtype=torch.float64))
    assert dropped == ["b"]


def test_bgr_stem_on_bgr_equals_the_filter_on_standardized_rgb():
    torch.manual_seed(0)
    weight = torch.randn(4, 3, 7, 7)
    rgb = torch.rand(1, 3, 20, 20) * 255
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    standardized = (rgb / 255 - mean.view(3, 1, 1)) / deviation.view(3, 1, 1)
    centered = (rgb - 255 * mean.view(3, 1, 1)).flip(1)
    expected = F.conv2d(standardized, weight, padding=3)
    converted = F.conv2d(centered, bgr_stem(weight), padding=3)
    torch.testing.assert_close(converted, expected, rtol=1e-4, atol=1e-4)
    assert bgr_stem(weight.half()).dtype == torch.float32


def test_bgr_stem_requires_three_channels():
    with pytest.raises(ValueError, match=r"\(4, 1, 7, 7\)"):
        bgr_stem(torch.zeros(4, 1, 7, 7))


def block(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {
        "res2a_branch2a/0": rng.normal(size=(4, 4, 1, 1)).astype(np.float32),
        "bn2a_branch2a/0": rng.normal(size=4),
        "bn2a_branch2a/1": rng.uniform(1, 2, 4),
        "bn2a_branch2a/2": np.array([4.0]),
        "scale2a_branch2a/0": rng.normal(size=4),
        "scale2a_branch2a/1": rng.normal(size=4),
    }


def test_caffe_batch_norm_is_divided_by_its_weight():
    blobs = block(np.random.default_rng(0))
    blobs |= {f"res075_{key}": np.full(1, np.nan) for key in blobs}
    blobs |= {f"conv1_res05{suffix}": np.full(1, np.nan) for suffix in ("/0", "/1")}
    state, dropped = caffe(blobs)
    bn = "base.layer2.block1.reduce.bn"
    expected = {
        "base.layer2.block1.reduce.conv.weight": blobs["res2a_branch2a/0"],
        f"{bn}.running_mean": blobs["bn2a_branch2a/0"] / 4,
        f"{bn}.running_var": blobs["bn2a_branch2a/1"] / 4,
        f"{bn}.weight": blobs["scale2a_branch2a/0"],
        f"{bn}.bias": blobs["scale2a_branch2a/1"],
    }
    assert state.keys() == expected.keys() and not dropped
    for key, value in expected.items():
        np.testing.assert_array_equal(state[key].numpy(), value)


def test_caffe_batch_norm_of_weight_zero_is_zero():
    state, _ = caffe(block(np.random.default_rng(0)) | {"bn2a_branch2a/2": np.zeros(1)})
    assert not state["base.layer2.block1.reduce.bn.running_mean"].any()


def test_caffe_bias_before_batch_norm_is_subtracted_from_the_mean():
    blobs = block(np.random.default_rng(0))
    blobs["res2a_branch2a/1"] = np.random.default_rng(1).normal(size=4)
    state, _ = caffe(blobs)
    mean = state["base.layer2.block1.reduce.bn.running_mean"].numpy()
    np.testing.assert_allclose(mean, blobs["bn2a_branch2a/0"] / 4 - blobs["res2a_branch2a/1"])
    assert "base.layer2.block1.reduce.conv.bias" not in state


def test_caffe_drops_the_classifier():
    classifier = {"fc1000/0": np.ones((5, 4)), "fc1000/1": np.ones(5)}
    state, dropped = caffe(block(np.random.default_rng(0)) | classifier)
    assert dropped == ["fc1000/0", "fc1000/1"] and len(state) == 5


@pytest.mark.parametrize(
    ("absent", "message"),
    [
        ("bn2a_branch2a/2", "bn2a_branch2a has no blob bn2a_branch2a/2"),
        ("scale2a_branch2a/1", "scale2a_branch2a has no blob scale2a_branch2a/1"),
        ("scale2a_branch2a", "bn2a_branch2a has no layer scale2a_branch2a"),
    ],
)
def test_missing_caffe_blob_is_an_error(absent, message):
    blobs = block(np.random.default_rng(0))
    with pytest.raises(ValueError, match=message):
        caffe({key: value for key, value in blobs.items() if not key.startswith(absent)})


def test_mxnet_drops_the_classifier():
    state, dropped = rename({"arg:bn7_gamma": np.ones(2), "arg:linear1000_weight": np.ones(1)}, mxnet_key)
    assert list(state) == ["backbone.bn7.weight"] and dropped == ["arg:linear1000_weight"]
