"""Names of weights: prefixes of training code, and the layout of transformers."""

import pytest
import torch

import clip
from clip.checkpoint import clean_keys
from tests.clip.test_checkpoint import SMALL_RESNET, small_state
from tests.conftest import parity_state


def under(prefix: str, state: dict) -> dict:
    return {f"{prefix}{key}": value for key, value in state.items()}


def assert_loads(content, expected, file):
    torch.save(content, file)
    loaded = clip.load(file, device="cpu", round_weights=False).state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], value) for key, value in expected.items())


@pytest.mark.parametrize(
    "prefix",
    ["_orig_mod.", "module._orig_mod.", "model.", "clip_model.", "clip.", "net.clip."],
)
def test_prefix_of_all_keys_is_removed(prefix, tmp_path):
    state = small_state()
    assert_loads(under(prefix, state), state, tmp_path / "a.pt")


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "model", "module"])
def test_state_dict_inside_a_training_checkpoint_is_found(wrapper, tmp_path):
    state = small_state(SMALL_RESNET)
    content = {wrapper: under("model.", state), "epoch": 3, "optimizer": {"state": {0: torch.ones(1)}}}
    assert_loads(content, state, tmp_path / "a.pt")


def test_nested_and_cyclic_wrappers_end(tmp_path):
    state = small_state()
    assert_loads({"model": {"state_dict": state}}, state, tmp_path / "a.pt")
    cyclic = {}
    cyclic["model"] = cyclic
    torch.save(cyclic, tmp_path / "b.pt")
    with pytest.raises(ValueError, match="is not a CLIP checkpoint"):
        clip.load(tmp_path / "b.pt", device="cpu")


def test_wrappers_inside_names_are_removed(tmp_path):
    state = small_state()
    wrapped = {
        key.replace("resblocks.0.", "resblocks.0._orig_mod.").replace(
            "visual.", "visual._fsdp_wrapped_module."
        ): value
        for key, value in state.items()
    }
    assert_loads(wrapped, state, tmp_path / "a.pt")


def test_scalars_of_open_clip_are_accepted(tmp_path):
    state = small_state()
    bias = {"logit_scale": state["logit_scale"].reshape(1), "logit_bias": torch.tensor(-10.0)}
    assert_loads({**state, **bias}, state, tmp_path / "a.pt")


def test_key_that_is_not_part_of_the_clip_is_named(tmp_path):
    torch.save({**under("model.", small_state()), "head.weight": torch.ones(3)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"1 are unknown \(head\.weight\)"):
        clip.load(tmp_path / "a.pt", device="cpu")


def test_two_models_in_one_file_raise(tmp_path):
    state = small_state()
    with pytest.raises(ValueError, match=r"a\.pt contains 2 CLIPs, with the prefixes \['model\.', 'ema\.'\]"):
        clean_keys({**under("model.", state), **under("ema.", state)}, "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt contains visual\.proj with and without a prefix"):
        clean_keys({**state, "module.visual.proj": state["visual.proj"]}, "a.pt")


NAMES = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "logit_scale": "logit_scale",
}
PARTS = [
    ("visual.ln_pre", "vision_model.pre_layrnorm"),
    ("visual.ln_post", "vision_model.post_layernorm"),
    ("ln_final", "text_model.final_layer_norm"),
    ("visual.transformer.resblocks", "vision_model.encoder.layers"),
    ("transformer.resblocks", "text_model.encoder.layers"),
    ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"),
    ("attn.out_proj", "self_attn.out_proj"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
]


def as_transformers(state: dict) -> dict:
    """Return a state dict of OpenAI's layout in the layout of transformers' `CLIPModel`."""
    result = {}
    for key, value in state.items():
        name = NAMES.get(key, key)
        if key in ("visual.proj", "text_projection"):
            result[{"visual.proj": "visual_projection"}.get(key, key) + ".weight"] = value.T.contiguous()
            continue
        if key not in NAMES:
            for ours, theirs in PARTS:
                name = name.replace(ours, theirs)
        if "in_proj" in name:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                result[name.replace("attn.in_proj_", f"self_attn.{letter}_proj.")] = part.clone()
        else:
            result[name] = value
    result["vision_model.embeddings.position_ids"] = torch.arange(5)
    result["text_model.embeddings.position_ids"] = torch.arange(77)
    return result


@pytest.mark.parametrize("prefix", ["", "clip."])
def test_layout_of_transformers_is_converted(prefix, tmp_path):
    state = parity_state("tiny", 1)
    theirs = as_transformers(state)
    assert "text_model.encoder.layers.0.self_attn.q_proj.weight" in theirs
    assert "vision_model.encoder.layers.9.mlp.fc2.bias" in theirs
    assert_loads(under(prefix, theirs), state, tmp_path / "a.pt")


def test_incomplete_layout_of_transformers_raises(tmp_path):
    theirs = as_transformers(parity_state("tiny", 1))
    vision = {key: value for key, value in theirs.items() if key.startswith("vision_model.")}
    no_query = {key: value for key, value in theirs.items() if "layers.0.self_attn.q_proj" not in key}
    scalar = {**theirs, "text_projection.weight": torch.tensor(1.0)}
    for content, fault in (
        (vision, "has no text_projection"),
        (no_query, r"4 weights are missing \(.*in_proj"),
        (scalar, "has no text_projection"),
    ):
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(ValueError, match=fault):
            clip.load(tmp_path / "a.pt", device="cpu")
