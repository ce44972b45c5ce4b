"""Checkpoint files of every supported format, and errors for unsupported files."""
import argparse
import json
import zipfile

import pytest
import torch
from safetensors.torch import save_file

import clip
from clip.model import CLIP, Config
from clip.prompts import encode_prompts, fingerprint, text_features
from tests.conftest import parity_state

SMALL_VIT = Config(32, 32, 2, 64, 8, 77, 49408, 64, 1)
SMALL_RESNET = Config(32, 64, (1, 1, 1, 1), 16, None, 77, 49408, 64, 1)


def small_state(config: Config = SMALL_VIT) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return CLIP(config).state_dict()


@pytest.mark.parametrize(
    "config",
    [
        SMALL_VIT,
        SMALL_RESNET,
        Config(32, 14 * 3, 2, 128, 14, 77, 49408, 64, 1),  # patch size of ViT-L/14
        Config(32, 64, 1, 64, 32, 77, 49408, 64, 1),  # patch size of ViT-B/32
    ],
)
def test_load_infers_the_configuration(config, tmp_path):
    torch.save(small_state(config), tmp_path / "model.pt")
    assert clip.load(tmp_path / "model.pt", device="cpu").config == config


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("ViT-B/16", Config(512, 224, 12, 768, 16, 77, 49408, 512, 12)),
        ("ViT-B/32", Config(512, 224, 12, 768, 32, 77, 49408, 512, 12)),
        ("ViT-L/14@336px", Config(768, 336, 24, 1024, 14, 77, 49408, 768, 12)),
        ("RN50", Config(1024, 224, (3, 4, 6, 3), 64, None, 77, 49408, 512, 12)),
        ("RN50x4", Config(640, 288, (4, 6, 10, 6), 80, None, 77, 49408, 640, 12)),
    ],
)
def test_infer_config_of_the_published_models(name, config):
    """The state dict is on the meta device: it has shapes but no memory."""
    with torch.device("meta"):
        state = CLIP(config).state_dict()
    assert clip.checkpoint.infer_config(state) == config


class Archived(torch.nn.Module):
    """Scriptable module tree whose parameters have the names of a state dict."""

    def __init__(self, state):
        super().__init__()
        for key, value in state.items():
            *parents, leaf = key.split(".")
            module = self
            for parent in parents:
                if parent not in dict(module.named_children()):
                    module.add_module(parent, torch.nn.Module())
                module = getattr(module, parent)
            module.register_parameter(leaf, torch.nn.Parameter(value, requires_grad=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_torchscript_archive_loads_like_its_state_dict(tmp_path):
    state = {key: value.half() for key, value in parity_state("tiny", 1).items()}
    torch.save(dict(state), tmp_path / "state.pt")
    module = Archived(state)
    for name in ("input_resolution", "context_length", "vocab_size"):  # entries of OpenAI's archives
        module.register_buffer(name, torch.tensor(1))
    module.sizes, module.flags = [1, 2], {"half": True}  # attributes that are not weights
    torch.jit.script(module).save(str(tmp_path / "archive.pt"))
    with zipfile.ZipFile(tmp_path / "archive.pt") as archive:
        assert any(name.endswith("constants.pkl") for name in archive.namelist())
    loaded = clip.load(tmp_path / "archive.pt", device="cpu").state_dict()
    expected = clip.load(tmp_path / "state.pt", device="cpu").state_dict()
    assert loaded.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(loaded[key], value), key


def test_archive_with_code_raises_value_error(tmp_path):
    file = tmp_path / "evil.pt"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("m/data.pkl", b"cos\nsystem\n(S'echo hacked'\ntR.")
        archive.writestr("m/constants.pkl", b"")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        clip.load(file, device="cpu")


def test_wrapped_and_prefixed_state_dicts_are_loaded(tmp_path):
    state = small_state()
    reference = clip.checkpoint.from_state_dict(state).state_dict()
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "plain.safetensors")
    parallel = {f"module.{k}": v for k, v in state.items()}
    torch.save({"state_dict": parallel, "epoch": 3}, tmp_path / "train.pt")
    torch.save({**state, "visual.positional_embedding_new": torch.ones(5, 64)}, tmp_path / "used.pt")
    tower = ("transformer.", "token_embedding", "positional_embedding", "ln_final", "text_projection")
    custom = {f"text.{k}" if k.startswith(tower) else k: v for k, v in state.items()}
    torch.save(custom, tmp_path / "custom.pt")
    for name in ("plain.safetensors", "train.pt", "custom.pt", "used.pt"):
        loaded = clip.load(tmp_path / name, device="cpu", round_weights=False).state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in reference.items()), name


def test_round_weights_rounds_matrices_only(tmp_path):
    state = small_state()
    torch.save(state, tmp_path / "model.pt")
    rounded = clip.load(tmp_path / "model.pt", device="cpu").state_dict()
    plain = clip.load(tmp_path / "model.pt", device="cpu", round_weights=False).state_dict()
    for key in ("visual.conv1.weight", "text_projection", "transformer.resblocks.0.attn.in_proj_weight"):
        assert torch.equal(rounded[key], state[key].half().float())
        assert torch.equal(plain[key], state[key]) and not torch.equal(plain[key], rounded[key])
    for key in ("visual.positional_embedding", "token_embedding.weight", "visual.ln_pre.weight"):
        assert torch.equal(rounded[key], state[key])


def test_open_clip_configuration_sets_the_activation(tmp_path):
    """GELU by default, QuickGELU if the configuration says so. Weights of such files are not rounded."""
    file, sidecar = tmp_path / "open_clip_pytorch_model.pt", tmp_path / "open_clip_config.json"
    torch.save(small_state(), file)
    config = {"embed_dim": 32, "vision_cfg": {}, "text_cfg": {}}
    sidecar.write_text(json.dumps({"model_cfg": config}))
    model = clip.load(file, device="cpu")
    assert model.config.activation == "gelu"
    assert torch.equal(model.state_dict()["visual.proj"], small_state()["visual.proj"])
    sidecar.write_text(json.dumps({"model_cfg": {**config, "quick_gelu": True}}))
    assert clip.load(file, device="cpu").config.activation == "quick_gelu"
    assert clip.load(f"ViT-B-16:{file}", device="cpu").config.activation == "gelu"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("config", [SMALL_VIT, SMALL_RESNET])
def test_precision_changes_only_the_image_tower(tmp_path, precision, config):
    torch.save(small_state(config), tmp_path / "model.pt")
    full = clip.load(tmp_path / "model.pt", device="cpu")
    half = clip.load(tmp_path / "model.pt", device="cpu", precision=precision)
    images = torch.randn(2, 3, 64, 96)
    assert half.visual(images).dtype == clip.PRECISIONS[precision]
    similarity = torch.cosine_similarity(half.visual(images).float(), full.visual(images))
    assert similarity.min() > 0.99
    assert fingerprint(half) == fingerprint(full)


def broken_files(folder):
    state = small_state()
    torch.save(state, folder / "good.pt")
    whole = (folder / "good.pt").read_bytes()
    (folder / "truncated.pt").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.pt").write_bytes(b"")
    (folder / "image.pt").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    torch.save({k: v for k, v in state.items() if k != "visual.conv1.weight"}, folder / "no_conv.pt")
    torch.save({k: v for k, v in state.items() if "c_fc" not in k}, folder / "no_mlp.pt")
    torch.save({**state, "head.weight": torch.ones(3)}, folder / "extra.pt")
    torch.save({**state, "visual.proj": torch.ones(63, 32)}, folder / "shape.pt")
    torch.save({"weight": torch.ones(3)}, folder / "other.pt")
    torch.save([1, 2], folder / "list.pt")
    torch.save({0: torch.ones(3)}, folder / "numbered.pt")
    torch.save({**state, "visual.proj": torch.ones(64, 32, dtype=torch.int32)}, folder / "integers.pt")
    torch.save({"state_dict": state, "args": argparse.Namespace(lr=1)}, folder / "arguments.pt")
    torch.save({k: v[:40] if v.shape[:1] == (64,) else v for k, v in state.items()}, folder / "narrow.pt")
    save_file({"weight": torch.ones(3)}, folder / "other.safetensors")
    (folder / "broken.safetensors").write_bytes(b"\xff" * 64)
    return {
        "truncated.pt": "truncated",
        "empty.pt": "not a readable checkpoint",
        "image.pt": "not a readable checkpoint",
        "no_conv.pt": "has no visual.conv1.weight",
        "no_mlp.pt": "6 weights are missing",
        "extra.pt": "1 are unknown (head.weight)",
        "shape.pt": "visual.proj has shape (63, 32)",
        "other.pt": "is not a CLIP checkpoint",
        "list.pt": "contains a list, expected a state dict",
        "numbered.pt": "is not a CLIP checkpoint",
        "integers.pt": "visual.proj has type torch.int32, expected floating point",
        "arguments.pt": "Python objects other than tensors",
        "narrow.pt": "tower widths must be multiples of 64, got 40, 40",
        "other.safetensors": "is not a CLIP checkpoint",
        "broken.safetensors": "not a readable checkpoint",
    }


def test_invalid_files_raise_one_line_that_names_file_and_fault(tmp_path):
    for name, sentence in broken_files(tmp_path).items():
        with pytest.raises(ValueError) as caught:
            clip.load(tmp_path / name, device="cpu")
        message = str(caught.value)
        assert sentence in message and name in message and "\n" not in message, message


def test_unknown_model_precision_or_device_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no model 'nothing\.pt'"):
        clip.load("nothing.pt")
    torch.save(small_state(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match="precision must be one of"):
        clip.load(tmp_path / "model.pt", precision="int8")
    for device in ("gpu", "mps", "xpu", "meta"):
        with pytest.raises(ValueError, match=f"--device: '{device}' is not supported"):
            clip.load(tmp_path / "model.pt", device=device)
    with pytest.raises(ValueError, match="'cuda:63' does not exist: torch detects"):
        clip.load(tmp_path / "model.pt", device="cuda:63")


def test_text_features_are_cached_per_model_template_and_names(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIP_WSSS_CACHE", str(tmp_path))
    torch.save(small_state(), tmp_path / "model.pt")
    model = clip.load(tmp_path / "model.pt", device="cpu")
    first = text_features(model, ["cat", "dog"], ["a {}."])
    assert torch.equal(first, encode_prompts(model, ["cat", "dog"], ["a {}."]))
    files = {file.name: file for file in tmp_path.glob("text-*.npy")}
    assert len(files) == 1
    with monkeypatch.context() as patch:
        patch.setattr("clip.prompts.encode_prompts", None)  # a call would fail
        assert torch.equal(text_features(model, ["cat", "dog"], ["a {}."]), first)
    next(iter(files.values())).write_bytes(b"damaged")
    assert torch.equal(text_features(model, ["cat", "dog"], ["a {}."]), first)
    for names, template in ((["cat"], "a {}."), (["cat", "dog"], "the {}.")):
        text_features(model, names, [template])
    assert len(list(tmp_path.glob("text-*.npy"))) == 3
