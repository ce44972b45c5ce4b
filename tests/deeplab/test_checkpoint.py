"""Weight files of every family and format load; wrong files are errors."""
import re
import sys
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision

from deeplab.checkpoint import family, load_full, load_init, read
from deeplab.keymaps import STRIDE_IN, bgr_stem
from deeplab.model import build_v2
from deeplab.resnet38 import build_r38
from segmentation.checkpoints import write_checkpoint
from segmentation.transforms import CAFFE_MEAN, IMAGENET_MEAN, caffe_normalize, imagenet_normalize
from tests.deeplab.common import build_v1, golden
from tests.weights import fill_module, parity_image

KEYS = golden("state_dict_keys.json")
STEM = "base.layer1.conv1.conv.weight"


def net_a(classes: int = 3, seed: int | None = None, **settings):
    """Return a narrow network A; with a seed, its weights are fixed."""
    model = build_v2(classes, **{"blocks": (1, 2, 2, 1), "width": 4} | settings)
    return model if seed is None else fill_module(model, seed)


def net_b(classes: int = 3, seed: int | None = None, **settings):
    model = build_r38(classes, **{"blocks": (2, 1, 2, 1), "width": 4} | settings)
    return model if seed is None else fill_module(model, seed)


def without_counters(state: dict) -> dict:
    return {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}


def prefixed(state: dict, prefix: str) -> dict:
    return {prefix + key.removeprefix("base."): value for key, value in state.items()}


def as_torchvision(state: dict) -> dict:
    """Return network A's backbone under torchvision's names, with a classifier; the stem is unchanged."""
    renamed = {"fc.weight": torch.ones(10, 128), "fc.bias": torch.ones(10)}
    for key, name in KEYS["torchvision_resnet101_to_base"].items():
        for leaf in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            value = state.get("base." + name.replace("weight", leaf))
            if value is not None:
                renamed[key.replace("weight", leaf)] = value
    return renamed


def as_caffe(state: dict, classes: int = 91) -> dict:
    """Return network A's backbone as Caffe blobs (sums of batch norm with weight 1000), with COCO's head."""
    blobs = {"fc1_coco/0": torch.ones(classes, 128, 1, 1), "fc1_coco/1": torch.ones(classes)}
    for layer, module in KEYS["caffe_layer_to_module_head_base"].items():
        if layer.startswith("bn") and f"{module}.weight" in state:
            blobs[f"{layer}/0"] = state[f"{module}.running_mean"] * 1000
            blobs[f"{layer}/1"] = state[f"{module}.running_var"] * 1000
            blobs[f"{layer}/2"] = torch.tensor([1000.0])
            scale = layer.replace("bn", "scale", 1)
            blobs |= {f"{scale}/0": state[f"{module}.weight"], f"{scale}/1": state[f"{module}.bias"]}
        elif not layer.startswith("fc") and f"{module}.weight" in state:
            blobs[f"{layer}/0"] = blobs[f"{layer}_res075/0"] = state[f"{module}.weight"]
    return blobs


def as_mxnet(state: dict) -> dict:
    arrays = {"arg:linear1000_weight": torch.ones(1000, 4), "arg:linear1000_bias": torch.ones(1000)}
    for key, name in KEYS["mxnet_to_backbone"].items():
        if name and f"backbone.{name}" in state:
            arrays[("aux:" if "moving" in key else "arg:") + key] = state[f"backbone.{name}"]
    return arrays


def assert_backbones_equal(model, expected: dict, exact: bool = True) -> None:
    state = without_counters(model.state_dict())
    names = [name for name in state if name.startswith(("base.layer", "backbone."))]
    assert names
    for name in names:
        close = {"rtol": 0, "atol": 0} if exact else {}
        torch.testing.assert_close(state[name], expected[name], **close, msg=name)


def error_of(load, *args) -> str:
    """Return the message of the error that `load` raises; it must be one line."""
    with pytest.raises((ValueError, OSError)) as caught:
        load(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("prefix", ["", "base.", "module.", "module.base.", "_orig_mod.base."])
def test_checkpoint_of_network_a_loads_with_any_prefix(prefix, tmp_path):
    source = net_a(seed=1).state_dict()
    torch.save(prefixed(source, prefix), tmp_path / "a.pth")
    assert family(tmp_path / "a.pth") == "deeplab-pytorch"
    assert list(read(tmp_path / "a.pth")) == list(source)
    for load in (load_init, load_full):
        model = net_a()
        report = load(model, tmp_path / "a.pth")
        assert all(torch.equal(value, source[key]) for key, value in model.state_dict().items())
        assert set(report.matched) == without_counters(source).keys()
        assert report.initial == report.ignored == () and not report.note


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_checkpoint_of_network_b_loads_with_any_prefix(prefix, tmp_path):
    source = net_b(seed=1).state_dict()
    torch.save(prefixed(source, prefix), tmp_path / "b.pth")
    assert family(tmp_path / "b.pth") == "resnet38d"
    for load in (load_init, load_full):
        model = net_b()
        report = load(model, tmp_path / "b.pth")
        assert all(torch.equal(value, source[key]) for key, value in model.state_dict().items())
        assert set(report.matched) == without_counters(source).keys()


@pytest.mark.parametrize("wrap", [lambda model: model, torch.nn.DataParallel, torch.compile])
def test_wrapped_model_loads(wrap, tmp_path):
    source = net_a(seed=1)
    torch.save(wrap(source).state_dict(), tmp_path / "a.pth")
    for load in (load_init, load_full):
        model = net_a()
        load(wrap(model), tmp_path / "a.pth")
        assert_backbones_equal(model, source.state_dict())


def write_wrapped(state, file):
    torch.save({"state_dict": state, "optimizer": {"lr": 0.1}, "epoch": 3}, file)


def write_legacy(state, file):
    torch.save(state, file, _use_new_zipfile_serialization=False)


def write_numpy(state, file):
    np.savez(file, **{key: value.numpy() for key, value in state.items()})


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.pth", write_wrapped),
        ("a.pt", write_legacy),
        ("a.safetensors", safetensors.torch.save_file),
        ("a.npz", write_numpy),
        ("a.pth", lambda state, file: torch.save(state | {"iteration": 5}, file)),
        ("a.pth", lambda state, file: torch.save(without_counters(state), file)),  # as PyTorch before 0.4.1
        ("a.pth", lambda state, file: torch.save(
            {key: value.double() if "running" in key else value for key, value in state.items()}, file
        )),
    ],
)
def test_file_format_loads(name, write, tmp_path):
    source = net_a(seed=1).state_dict()
    write(source, tmp_path / name)
    model = net_a()
    load_full(model, tmp_path / name)
    for key, value in model.state_dict().items():
        assert value.dtype == source[key].dtype and torch.equal(value, source[key])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_file_loads_as_float32(dtype, tmp_path):
    source = net_a(seed=1).to(dtype).state_dict()
    torch.save(source, tmp_path / "a.pth")
    model = net_a()
    load_full(model, tmp_path / "a.pth")
    assert_backbones_equal(model, {key: value.float() for key, value in source.items()})


def test_checkpoint_saved_on_a_gpu_is_read_on_the_cpu(tmp_path, monkeypatch):
    source = net_a(seed=1).state_dict()
    with monkeypatch.context() as patch:  # files record the device of every tensor
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save(source, tmp_path / "a.pth")
    assert b"cuda:0" in (tmp_path / "a.pth").read_bytes()
    assert {value.device.type for value in read(tmp_path / "a.pth").values()} == {"cpu"}


def test_coco_weights_initialize_the_backbone_only(tmp_path):
    """The file is a v1 network of 91 classes without prefix: only its backbone fits a v2 network."""
    source = fill_module(build_v1(91, (1, 2, 2, 1), 4), 1)
    torch.save(source.state_dict(), tmp_path / "coco.pth")
    model = net_a(21)
    head = {key: value.clone() for key, value in model.state_dict().items() if "aspp" in key}
    report = load_init(model, tmp_path / "coco.pth")
    assert_backbones_equal(model, {f"base.{key}": value for key, value in source.state_dict().items()})
    assert all(torch.equal(model.state_dict()[key], value) for key, value in head.items())
    assert set(report.initial) == head.keys()
    assert report.ignored == ("base.fc.weight", "base.fc.bias")
    count = len(without_counters(source.state_dict())) - 2
    assert str(report) == (
        f"{tmp_path / 'coco.pth'} (deeplab-pytorch): {count} tensors loaded; 8 of the model left at their "
        "initial values (base.aspp.c0.bias, base.aspp.c0.weight, base.aspp.c1.bias, ...); 2 of the file "
        "ignored (base.fc.bias, base.fc.weight)"
    )
    sentence = error_of(load_full, net_a(21), tmp_path / "coco.pth")
    assert "has the backbone but not the head" in sentence and "(model.init), and give the" in sentence
    load_full(build_v1(91, (1, 2, 2, 1), 4), tmp_path / "coco.pth")  # it is a complete v1 network


def test_imagenet_files_initialize_network_b(tmp_path):
    """The converted file has the backbone's names without prefix. Classifiers are ignored."""
    source = net_b(seed=1).state_dict()
    start = "backbone."
    bare = {key.removeprefix(start): value for key, value in source.items() if key.startswith(start)}
    torch.save(bare | {"fc8.weight": torch.ones(20, 256, 1, 1)}, tmp_path / "res38_cls.pth")
    torch.save(as_mxnet(source), tmp_path / "mxnet.pth")
    for name, dropped in (("res38_cls.pth", ("fc8.weight",)),
                          ("mxnet.pth", ("arg:linear1000_weight", "arg:linear1000_bias"))):
        model = net_b(5)
        head = model.cls_conv.weight.clone()
        report = load_init(model, tmp_path / name)
        assert_backbones_equal(model, source)
        assert torch.equal(model.cls_conv.weight, head)
        assert report.ignored == dropped and "cls_conv.weight" in report.initial
    assert family(tmp_path / "mxnet.pth") == "mxnet"


def test_caffe_blobs_initialize_network_a(tmp_path):
    source = net_a(seed=1).state_dict()
    write_numpy(as_caffe(source), tmp_path / "init.npz")
    assert family(tmp_path / "init.npz") == "caffe"
    model = net_a()
    report = load_init(model, tmp_path / "init.npz")
    assert_backbones_equal(model, source, exact=False)  # not exact: multiplied and divided by 1000
    assert len(report.initial) == 8 and report.ignored == ("base.fc.weight", "base.fc.bias")
    assert "stride_in=reduce" in load_init(net_a(stride_in="conv3x3"), tmp_path / "init.npz").note


def test_caffe_blobs_of_a_trained_network_load_in_full(tmp_path):
    source = net_a(seed=1).state_dict()
    blobs = {key: value for key, value in as_caffe(source).items() if not key.startswith("fc1_coco")}
    for branch in range(4):
        for position, leaf in enumerate(("weight", "bias")):
            value = source[f"base.aspp.c{branch}.{leaf}"]
            blobs[f"fc1_voc12_c{branch}/{position}"] = value
            blobs[f"fc1_voc12_c{branch}_res05/{position}"] = value
    write_numpy(blobs, tmp_path / "train2.npz")
    model = net_a()
    load_full(model, tmp_path / "train2.npz")
    for key, value in without_counters(model.state_dict()).items():
        torch.testing.assert_close(value, source[key], msg=key)


def test_torchvision_weights_initialize_network_a(tmp_path):
    source = net_a(seed=1).state_dict()
    torch.save(as_torchvision(source), tmp_path / "resnet.pth")
    assert family(tmp_path / "resnet.pth") == family(as_torchvision(source)) == "torchvision"
    model = net_a(stride_in=STRIDE_IN["torchvision"])
    report = load_init(model, tmp_path / "resnet.pth")
    assert_backbones_equal(model, source | {STEM: bgr_stem(source[STEM])})
    assert report.ignored == ("fc.weight", "fc.bias") and not report.note
    assert "stride_in=conv3x3" in str(load_init(net_a(), tmp_path / "resnet.pth"))


def test_torchvision_weights_give_torchvision_features(tmp_path):
    """Layers 1 to 3 have the same strides and dilations as torchvision's.

    An image side of 65 pixels gives 33 before the first pooling and 17 after it, in both roundings.
    """
    torch.manual_seed(0)
    blocks = [2, 2, 1, 1]
    theirs = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, blocks)
    fill_module(theirs, 0)
    torch.save(theirs.state_dict(), tmp_path / "resnet.pth")
    ours = build_v2(3, tuple(blocks), stride_in="conv3x3")
    load_init(ours, tmp_path / "resnet.pth")

    image = parity_image("dl:torchvision", 65, 97)
    layers = theirs.eval()
    x = torch.from_numpy(imagenet_normalize(image))[None]
    with torch.no_grad():
        x = layers.maxpool(layers.relu(layers.bn1(layers.conv1(x))))
        expected = layers.layer2(layers.layer1(x))  # (1, 512, 9, 13)
        base = ours.eval().base
        stages = base.layer1, base.layer2, base.layer3
        features = {}
        offset = torch.tensor(CAFFE_MEAN - 255 * np.array(IMAGENET_MEAN[::-1])).float().view(3, 1, 1)
        assert offset.abs().max() <= 1  # difference of the two means in gray levels
        for name, shift in (("same mean", offset), ("own mean", 0)):
            x = torch.from_numpy(caffe_normalize(image))[None] + shift
            for stage in stages:
                x = stage(x)
            features[name] = x
    scale = expected.abs().max()
    assert features["same mean"].shape == expected.shape
    assert (features["same mean"] - expected).abs().max() <= 1e-5 * scale
    assert (features["own mean"] - expected).abs().max() <= 0.01 * scale

    unflipped = build_v2(3, tuple(blocks), stride_in="conv3x3")
    unflipped.load_state_dict(ours.state_dict())
    with torch.no_grad():  # control: without the flip of channels the features differ
        stem = unflipped.base.layer1.conv1.conv.weight
        stem.copy_(stem.flip(1))
        x = torch.from_numpy(caffe_normalize(image))[None]
        for stage in list(unflipped.eval().base)[:3]:
            x = stage(x)
    assert (x - expected).abs().max() > 0.1 * scale


def test_head_tensors_of_equal_shape_are_loaded(tmp_path):
    source = net_b(3, seed=1).state_dict()
    torch.save(source, tmp_path / "b.pth")
    model = net_b(5)
    report = load_init(model, tmp_path / "b.pth")
    assert torch.equal(model.conv_fov.weight, source["conv_fov.weight"])
    assert report.initial == report.ignored == ("cls_conv.weight", "cls_conv.bias")


def test_backbone_without_one_convolution_is_initial_weights_only(tmp_path):
    source = net_a(seed=1).state_dict()
    lost = "base.layer5.block1.shortcut.conv.weight"
    torch.save({key: value for key, value in source.items() if key != lost}, tmp_path / "a.pth")
    report = load_init(net_a(), tmp_path / "a.pth")
    assert report.initial == (lost,)
    assert "1 tensors are missing" in (sentence := error_of(load_full, net_a(), tmp_path / "a.pth"))
    assert lost in sentence


@pytest.mark.parametrize(("build", "norm"), [
    (net_a, "base.layer5.block1.shortcut.bn"), (net_b, "backbone.b3.bn_branch2a"), (net_b, "backbone.bn7"),
])  # fmt: skip
def test_backbone_without_batch_norm_tensor_is_an_error(build, norm, tmp_path):
    """Batch norm is not trained: missing tensors would keep their initial values."""
    source = build(seed=1).state_dict()
    for leaf in ("weight", "bias", "running_mean", "running_var"):
        lost = f"{norm}.{leaf}"
        torch.save({key: value for key, value in source.items() if key != lost}, tmp_path / "a.pth")
        sentence = error_of(load_init, build(), tmp_path / "a.pth")
        assert f"lacks 1 tensors of the backbone's batch norm ({lost})" in sentence


@pytest.mark.parametrize("load", [load_init, load_full])
@pytest.mark.parametrize(("name", "value", "message"), [
    ("base.layer2.block1.reduce.conv.weight", torch.nan, "NaN or infinity in"),
    ("base.aspp.c0.bias", torch.inf, "NaN or infinity in"),
    ("base.layer1.conv1.bn.running_mean", 1e300, "NaN or infinity in"),  # in float64
    ("base.layer1.conv1.bn.running_var", -1e-3, "variances below 0 in"),
])  # fmt: skip
def test_invalid_numbers_are_an_error(load, name, value, message, tmp_path):
    state = net_a(seed=1).state_dict()
    state[name] = state[name].double()
    state[name].view(-1)[1] = value
    torch.save(state, tmp_path / "a.pth")
    model = net_a()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    sentence = error_of(load, model, tmp_path / "a.pth")
    assert f"{message} {name}" in sentence and str(tmp_path / "a.pth") in sentence
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("load", [load_init, load_full])
def test_other_depth_is_an_error(load, tmp_path):
    torch.save(net_a(seed=1).state_dict(), tmp_path / "a.pth")
    for blocks, differs in (((1, 2, 8, 1), "layer4.block3"), ((1, 2, 1, 1), "layer4.block2")):
        model = net_a(blocks=blocks)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        sentence = error_of(load, model, tmp_path / "a.pth")
        assert str(tmp_path / "a.pth") in sentence
        assert differs in sentence
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_file_without_most_of_the_backbone_is_an_error(tmp_path):
    """The error names tensors that are only in the file, and tensors that are only in the model."""
    state = net_a(seed=1).state_dict()
    count = len([key for key in without_counters(state) if key.startswith("base.layer")])
    few = {key: state[key] for key in ("base.layer2.block1.reduce.conv.weight", "base.aspp.c0.weight")}
    torch.save(few | {"base.layer5.block9.reduce.conv.weight": torch.ones(1)}, tmp_path / "a.pth")
    sentence = error_of(load_init, net_a(), tmp_path / "a.pth")
    assert f"1 of {count + 1} backbone tensors" in sentence
    assert "base.layer5.block9.reduce.conv.weight" in sentence and "base.layer1.conv1.bn.bias" in sentence


@pytest.mark.parametrize("load", [load_init, load_full])
def test_other_width_is_an_error(load, tmp_path):
    torch.save(net_a(width=8, seed=1).state_dict(), tmp_path / "a.pth")
    sentence = error_of(load, net_a(), tmp_path / "a.pth")
    assert re.search(r"base\.\S+ is \(\d+.*\) in the file, \(\d+.*\) in the model", sentence)


@pytest.mark.parametrize("build", [net_a, net_b])
def test_other_number_of_classes_loads_the_backbone_only(build, tmp_path):
    torch.save(build(7, seed=1).state_dict(), tmp_path / "7.pth")
    sentence = error_of(load_full, build(3), tmp_path / "7.pth")
    assert "7 classes" in sentence and "model has 3" in sentence
    assert not any(name.startswith("base.layer") for name in load_init(build(3), tmp_path / "7.pth").initial)


@pytest.mark.parametrize("load", [load_init, load_full])
def test_weights_of_the_other_network_are_an_error(load, tmp_path):
    torch.save(net_a(seed=1).state_dict(), tmp_path / "a.pth")
    torch.save(net_b(seed=1).state_dict(), tmp_path / "b.pth")
    torch.save(as_mxnet(net_b(seed=1).state_dict()), tmp_path / "m.pth")
    a, b = "DeepLab-v2 on ResNet-101", "DeepLab-v1 on ResNet-38d"
    assert f"weights of {a}, but the model is {b}" in error_of(load, net_b(), tmp_path / "a.pth")
    assert f"weights of {b}, but the model is {a}" in error_of(load, net_a(), tmp_path / "b.pth")
    assert f"weights of {b}, but the model is {a}" in error_of(load, net_a(), tmp_path / "m.pth")


def test_full_load_requires_exactly_the_tensors_of_the_model(tmp_path):
    torch.save(net_b(seed=1).state_dict() | {"fc8.weight": torch.ones(1)}, tmp_path / "b.pth")
    assert "1 unknown (fc8.weight)" in error_of(load_full, net_b(), tmp_path / "b.pth")
    torch.save(net_a(seed=1, rates=(1, 2)).state_dict(), tmp_path / "a.pth")
    assert "4 tensors are missing" in error_of(load_full, net_a(), tmp_path / "a.pth")


class Attack:
    """Unpickling this object creates a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_file_that_is_no_checkpoint_is_an_error(tmp_path):
    state = net_a(seed=1).state_dict()
    torch.save(state, tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pth").write_text("<html>not found</html>")
    (tmp_path / "empty.pth").touch()
    safetensors.torch.save_file(state, tmp_path / "whole.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:5000])
    write_numpy(state, tmp_path / "whole.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:5000])
    np.savez(tmp_path / "objects.npz", **{STEM: np.array([Attack(tmp_path / "ran")], object)})
    torch.save(state | {"settings": Attack(tmp_path / "ran")}, tmp_path / "objects.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"visual.conv1.weight": torch.ones(1)}, tmp_path / "clip.pth")
    torch.save({}, tmp_path / "nothing.pth")
    torch.save({key: value.int() for key, value in state.items()}, tmp_path / "integers.pth")
    torch.save(state | prefixed(state, "module.base."), tmp_path / "two.pth")
    torch.save({"res2a_branch2a/0": torch.ones(1), "bn2a_branch2a/0": torch.ones(1)}, tmp_path / "caffe.pth")
    messages = {
        "cut.pth": "truncated",
        "text.pth": "damaged",
        "empty.pth": "truncated",
        "cut.safetensors": "truncated",
        "cut.npz": "damaged",
        "objects.npz": "more than arrays of numbers",
        "objects.pth": "not loaded for safety",
        "list.pth": "contains a list",
        "clip.pth": "(visual.conv1.weight), none like base.layer2.block1.reduce.conv.weight",
        "nothing.pth": "it has 0 tensors",
        "integers.pth": "torch.int32, not float",
        "two.pth": "more than one network",
        "caffe.pth": "bn2a_branch2a has no blob bn2a_branch2a/1",
        "absent.pth": "does not exist",
        ".": "is not a file",
    }
    for name, message in messages.items():
        sentence = error_of(load_init, net_a(), tmp_path / name)
        assert message in sentence and str(tmp_path / name) in sentence, sentence
    assert not (tmp_path / "ran").exists()
    assert "the state dict has no weights" in error_of(family, {})


def test_npz_files_of_other_content_or_declared_size_are_errors(tmp_path):
    (tmp_path / "pointer.npz").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", bytes(200_000_000))
    for name, message in (("pointer.npz", "Git LFS pointer"), ("bomb.npz", "it is damaged")):
        with pytest.raises(ValueError, match=rf"{name} cannot be read as \.npz: .*{message}"):
            load_init(net_a(), tmp_path / name)


def test_big_endian_npz_is_read(tmp_path):
    state = net_a(seed=1).state_dict()
    np.savez(tmp_path / "a.npz", **{key: value.numpy().astype(">f4") for key, value in state.items()})
    read_state = read(tmp_path / "a.npz")
    assert torch.equal(read_state["base.layer2.block1.reduce.conv.weight"],
                       state["base.layer2.block1.reduce.conv.weight"])  # fmt: skip


def test_unexpected_shapes_in_caffe_blobs_are_errors(tmp_path):
    one = torch.ones(4)
    blobs = {"bn2a_branch1/0": one, "bn2a_branch1/1": one, "bn2a_branch1/2": torch.ones(0),
             "scale2a_branch1/0": one, "scale2a_branch1/1": one, "res2a_branch1/0": torch.ones(4, 3, 1, 1),
             "res2a_branch1/1": torch.ones(5)}  # fmt: skip
    for changed in ({}, {"bn2a_branch1/2": torch.ones(1)}):
        torch.save(blobs | changed, tmp_path / "a.pth")
        with pytest.raises(ValueError, match=r"a\.pth is not a complete checkpoint|common"):
            load_init(net_a(), tmp_path / "a.pth")


PAGE = Path(__file__).parents[2] / "docs" / "deeplab_weights.md"


@pytest.mark.parametrize("name", ["init.caffemodel", "resnet38.params"])
def test_caffe_and_mxnet_files_point_to_the_conversion_page(name, tmp_path):
    (tmp_path / name).write_bytes(b"anything")
    sentence = error_of(load_init, net_a(), tmp_path / name)
    assert f"docs/{PAGE.name}" in sentence and PAGE.is_file()


def test_conversion_code_of_the_docs_runs(tmp_path, monkeypatch):
    """The code runs with stubs of the two frameworks, and writes files that load."""
    a, b = net_a(seed=1).state_dict(), net_b(seed=1).state_dict()
    layers: dict[str, SimpleNamespace] = {}
    for key, value in as_caffe(a).items():
        layer, position = key.split("/")
        blob = SimpleNamespace(data=value.flatten().tolist(), shape=SimpleNamespace(dim=list(value.shape)))
        layers.setdefault(layer, SimpleNamespace(name=layer, blobs=[])).blobs.append(blob)
        assert len(layers[layer].blobs) == int(position) + 1
    net = SimpleNamespace(layer=list(layers.values()))
    caffe, mxnet = ModuleType("caffe"), ModuleType("mxnet")
    caffe.proto = ModuleType("caffe.proto")
    caffe.proto.caffe_pb2 = SimpleNamespace(NetParameter=SimpleNamespace(FromString=lambda data: net))
    arrays = {key: SimpleNamespace(asnumpy=value.numpy) for key, value in as_mxnet(b).items()}
    mxnet.nd = SimpleNamespace(load=lambda file: arrays)
    for name, module in (("caffe", caffe), ("caffe.proto", caffe.proto), ("mxnet", mxnet)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.chdir(tmp_path)
    Path("init.caffemodel").write_bytes(b"")
    for lines in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(lines, {})
    files = sorted(tmp_path.glob("*.npz"))
    assert [family(file) for file in files] == ["mxnet", "caffe"]
    model = net_a()
    load_init(model, files[1])
    assert_backbones_equal(model, a, exact=False)
    model = net_b()
    load_init(model, files[0])
    assert_backbones_equal(model, b)


def test_written_checkpoint_is_a_plain_state_dict(tmp_path):
    source = net_a(seed=1).to(memory_format=torch.channels_last)
    write_checkpoint(source, tmp_path / "new" / "a.pth")
    model = net_a()
    load_full(model, tmp_path / "new" / "a.pth")
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in source.state_dict().items())
    assert all(value.is_contiguous() for value in read(tmp_path / "new" / "a.pth").values())
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["a.pth"]
