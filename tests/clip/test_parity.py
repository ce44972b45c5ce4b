"""CLIP against golden vectors: tokens, text features, network input, image tower."""
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import clip
import coco14
import voc12
from clip.positions import resample_positions
from clip.prompts import encode_prompts
from tests.conftest import CASES, golden, parity_image, relative

BENCHMARKS = {"voc": voc12.BENCHMARK, "coco": coco14.BENCHMARK}


@pytest.mark.parametrize("data", BENCHMARKS)
def test_token_ids_of_every_prompt_match_golden(data):
    reference, benchmark = golden("tokens"), BENCHMARKS[data]
    template = benchmark.templates[0]
    for kind, names in (("fg", benchmark.prompts), ("bg", benchmark.backgrounds)):
        ids = clip.tokenize([template.format(name) for name in names])
        np.testing.assert_array_equal(ids, reference[f"{data}_{kind}"])


def test_token_ids_of_edge_cases_match_golden():
    reference = golden("tokens")
    texts = json.loads(str(reference["edge_strings"]))
    np.testing.assert_array_equal(clip.tokenize(texts), reference["edge"])
    long = "word " * 100 + "es"
    np.testing.assert_array_equal(clip.tokenize(long, truncate=True), reference["truncated"])
    with pytest.raises(ValueError, match="103 tokens"):
        clip.tokenize(long)


def test_text_features_do_not_depend_on_the_batch(parity_clip):
    """All texts of a batch are cut to the longest one. An empty batch is allowed."""
    model = parity_clip("tiny", 0)
    tokens = clip.tokenize(["a dog", "a photo of a very long name of a dog", "dog"])
    together = model.encode_text(tokens)
    alone = torch.cat([model.encode_text(tokens[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert model.encode_text(tokens[:0]).shape == (0, model.config.embed_dim)


@pytest.mark.parametrize(
    ("preset", "seed"), [("tiny", 0), ("tiny", 1), ("tiny", 2), ("tiny", 3), ("vit_b16", 0)]
)
def test_text_features_match_golden(parity_clip, preset, seed):
    reference, model = golden("text"), parity_clip(preset, seed)
    compared = 0
    subset = slice(None, None, 8 if preset == "vit_b16" else 1)  # every eighth prompt of the large model
    for data, benchmark in BENCHMARKS.items():
        for kind, names in (("fg", benchmark.prompts), ("bg", benchmark.backgrounds)):
            key = f"{preset}_s{seed}_{data}_{kind}"
            if key in reference:
                features = encode_prompts(model, names[subset], benchmark.templates)
                assert relative(features, reference[key][subset]) <= 5e-5
                compared += 1
            if f"{key}_raw" in reference:
                tokens = torch.as_tensor(golden("tokens")["voc_fg"][subset])
                assert relative(model.encode_text(tokens), reference[f"{key}_raw"][subset]) <= 5e-5
    assert compared >= 2


def test_features_of_several_templates_are_averaged(parity_clip):
    model = parity_clip("tiny", 1)
    single = [encode_prompts(model, ["cat"], [template]) for template in ("a {}.", "the {}.")]
    both = encode_prompts(model, ["cat"], ["a {}.", "the {}."])
    torch.testing.assert_close(both, F.normalize(sum(single) / 2, dim=-1))


def test_preprocess_resizes_before_conversion_to_rgb():
    palette = [0, 0, 0, 255, 0, 0, 0, 255, 0, 10, 20, 250]
    for key, reference in golden("preprocess").items():
        mode, size = key.split("_")
        height, width = map(int, size.split("x"))
        pixels = np.asarray(parity_image(f"es_pre_{key}", (height, width)))
        if mode == "RGB":
            image = Image.fromarray(pixels)
        elif mode == "L":
            image = Image.fromarray(pixels[:, :, 1])
        else:
            image = Image.fromarray(pixels[:, :, 0] // 64)
            image.putpalette(palette)
        result = clip.preprocess(image, clip.target_size(height, width, 16))
        np.testing.assert_array_equal(result, reference, err_msg=key)


@pytest.mark.parametrize("case", CASES)
def test_image_tower_matches_golden(parity_clip, case):
    name, size, preset, seed, _, _ = CASES[case]
    reference, visual = golden(f"case_{case}"), parity_clip(preset, seed).visual
    image = clip.preprocess(parity_image(name, size), clip.target_size(*size, visual.patch_size))
    np.testing.assert_array_equal(image, reference["input"])
    with torch.no_grad():
        tokens, grid = visual.embed(image[None])
        positions = resample_positions(visual.positional_embedding, visual.grid, *grid)
        assert relative(positions, reference["pos_embed"].astype(np.float32)) == 0
        maps = []
        for index in range(visual.layers):
            if index == visual.layers - 1:
                assert relative(tokens[0], reference["tokens"]) <= 1e-4
            fused, _ = visual.block(index, tokens)
            tokens, attention = visual.block(index, tokens, need_weights=True)
            torch.testing.assert_close(fused, tokens, rtol=1e-4, atol=1e-4)
            maps.append(attention[0])
    assert relative(torch.stack(maps), reference["attn"]) <= 1e-4
