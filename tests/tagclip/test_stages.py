"""Every stage of TagCLIP against golden vectors of the reference implementation, and its properties."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import clip
from clip import CLIP, Config
from clip.tokenizer import tokenize
from tagclip import Tagger, TagSettings, tag_images
from tagclip import model as tagging
from tagclip.crops import Crop, candidate_threshold, candidates, class_tokens, crops, cut
from tagclip.model import TEMPLATES
from tagclip.patches import (
    class_boxes,
    class_probabilities,
    min_max_normalize,
    patch_level,
    refined_probabilities,
)
from tests import weights
from tests.tagclip.common import (
    IMAGES,
    NAMES,
    PLAIN,
    SETS,
    TINY12,
    golden,
    image,
    model,
    model_of,
    resized,
    write_model,
)

CASES = [(name, image_name) for name in SETS for image_name in IMAGES]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return model(tmp_path_factory.mktemp("tiny12"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return model(tmp_path_factory.mktemp("tiny"), "tiny")


def text_of(name: str) -> torch.Tensor:
    return torch.from_numpy(golden("text")[f"{name}/features"])


def network_input(pixels: np.ndarray) -> torch.Tensor:
    return clip.normalize(torch.tensor(pixels))[None]


def unpacked(boxes: np.ndarray, patches: int) -> np.ndarray:
    return np.unpackbits(boxes, axis=1)[:, :patches]


def test_templates_are_the_published_ones():
    assert list(TEMPLATES) == NAMES["templates"]


def test_text_features_match_golden(tiny):
    expected = golden("text")
    for name in ("dog", "traffic light", "wall-other"):
        tokens = tokenize([template.format(name) for template in TEMPLATES])
        np.testing.assert_array_equal(tokens, expected[f"tokens/{name}"])
        features = tiny.encode_text(tokens).detach()
        np.testing.assert_allclose(features, expected[f"prompts/{name}"], atol=1e-5)
    for name, (_, names, _) in SETS.items():
        features = clip.encode_prompts(tiny, names[3::30], TEMPLATES)
        np.testing.assert_allclose(features, expected[f"{name}/features"][3::30], atol=1e-5)


def test_network_input_matches_golden():
    for name, expected in golden("preprocess").items():
        np.testing.assert_allclose(network_input(resized(image(name)))[0], expected, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in IMAGES if name != "tagclip-5"])
def test_attention_maps_match_golden(tiny, name):
    """The maps for averaging and voting are those without the mask of the last block."""
    expected = golden("stages_voc")
    tokens, _ = tiny.visual.embed(network_input(resized(image(name))), "resampled")
    with torch.no_grad():
        maps = torch.cat([attention for _, attention in tiny.visual.blocks(tokens, need_weights=True)])
    if f"{name}/attention" in expected:
        np.testing.assert_allclose(maps, expected[f"{name}/attention"], atol=2e-3)
    else:
        np.testing.assert_allclose(maps[:, 0], expected[f"{name}/attention_row0"], atol=2e-3)
        mean = maps[:, 1:, 1:].mean((1, 2))
        np.testing.assert_allclose(mean, expected[f"{name}/attention_mean"], atol=1e-6)


@pytest.mark.parametrize(("name", "image_name"), CASES)
def test_stages_match_golden(tiny, name, image_name):
    classes, _, settings = SETS[name]
    prefix = f"{image_name}/"
    vectors = golden(f"stages_{name}").items()
    expected = {key.removeprefix(prefix): value for key, value in vectors if key.startswith(prefix)}
    pixels, text = resized(image(image_name)), text_of(name)

    tokens, attention, grid = patch_level(tiny.visual, network_input(pixels), settings)
    coarse = class_probabilities(tokens[:, 1:], text, tiny.logit_scale)
    first = attention @ coarse
    boxes = class_boxes(first, grid, settings)
    refined = refined_probabilities(coarse, attention, grid, settings)[0]
    patches = grid[0] * grid[1]
    thinned = slice(None, None, 7 if len(expected["coarse"]) < patches else 1)
    if "tokens" in expected:
        thinned_tokens = slice(None, None, 7 if len(expected["tokens"]) <= patches else 1)
        np.testing.assert_allclose(tokens[0, thinned_tokens], expected["tokens"], atol=2e-3)
    if "weights" in expected:
        np.testing.assert_allclose(attention[0], expected["weights"], atol=5e-4)
    np.testing.assert_allclose(coarse[0, thinned], expected["coarse"], atol=2e-3)
    np.testing.assert_allclose(first[0, thinned], expected["first"], atol=5e-4)
    np.testing.assert_array_equal(boxes[0].T.numpy(), unpacked(expected["class_boxes"], patches))
    np.testing.assert_allclose(refined[thinned], expected["refined"], atol=5e-4)

    threshold = candidate_threshold(refined, settings.ratio)
    assert float(threshold) == pytest.approx(float(expected["theta"]), abs=5e-4)
    class_ids = candidates(refined, classes, settings.ratio)
    assert class_ids == expected["candidates"].tolist()
    cropped = crops(refined, grid, class_ids, settings)
    assert len(cropped) == len(expected.get("cwr_masks", ()))
    if cropped:
        views = [cut(network_input(pixels)[0], crop, 16, 224) for crop in cropped]
        images, cells = (torch.stack(part) for part in zip(*views, strict=True))
        np.testing.assert_array_equal(cells, expected["cwr_masks"])
        if "cwr_crop0" in expected:
            np.testing.assert_allclose(images[0, :, ::8, ::8], expected["cwr_crop0"], atol=1e-5)
        features = class_tokens(tiny.visual, images, cells, settings)
        np.testing.assert_allclose(features, expected["cwr_class_token"], atol=2e-3)
        probabilities = class_probabilities(features, text, tiny.logit_scale)
        chosen = probabilities[range(len(cropped)), [crop.class_id for crop in cropped]]
        np.testing.assert_allclose(chosen, expected["cwr_probability"], atol=2e-3)

    [tags] = tag_images(tiny, [pixels], text, classes, settings)
    np.testing.assert_allclose(tags.maps.max((1, 2)), expected["local"], atol=5e-4)
    np.testing.assert_allclose(tags.scores, expected["scores"], atol=5e-4)
    assert list(tags.reidentified) == [crop.class_id for crop in cropped]


def test_tagger_accepts_images_of_any_mode_and_size(tiny, monkeypatch):
    text, settings = text_of("voc"), TagSettings(max_patches=40)
    monkeypatch.setattr(clip, "text_features", lambda *_: text)
    names = SETS["voc"][1]
    tagger = Tagger(tiny, names[:20], names[20:])
    shrinking = Tagger(tiny, names[:20], names[20:], settings=settings)
    lines = str(golden("end_to_end")["voc/label_file"]).splitlines()
    scores = golden("end_to_end")["voc/scores"]
    for row, (name, line) in enumerate(zip(IMAGES, lines, strict=True)):
        tags = tagger(image(name))
        np.testing.assert_allclose(tags.scores, scores[row], atol=5e-4)
        assert tagger.names(tags) == [names[int(key)] for key in line.split()[1:]]
    color = image("tagclip-2")
    palette = color.quantize(200)
    np.testing.assert_array_equal(tagger(palette).scores, tagger(palette.convert("RGB")).scores)
    assert np.prod(shrinking(color).maps.shape[1:]) <= 40
    resnet = CLIP(Config(64, 64, (1, 1, 1, 1), 64, None, 77, 49408, 64, 1))
    with pytest.raises(ValueError, match="a ResNet tower has no attention between patches; tagging needs it"):
        Tagger(resnet, ["dog"])


@pytest.mark.parametrize("name", PLAIN)
def test_ten_blocks_match_golden(plain, name):
    expected, settings = golden("plain_tiny"), PLAIN[name]
    classes, names, _ = SETS[name]
    text = torch.from_numpy(expected[f"{name}/text"])
    np.testing.assert_allclose(
        clip.encode_prompts(plain, names[::40], TEMPLATES), expected[f"{name}/text"][::40], atol=1e-5
    )
    for image_name, size in (("tagclip-p0", (64, 64)), ("tagclip-p1", (80, 112)), ("tagclip-p2", (49, 100))):
        pixels, prefix = resized(image(image_name, size)), f"{name}/{image_name}"
        tokens, attention, grid = patch_level(plain.visual, network_input(pixels), settings)
        np.testing.assert_allclose(tokens[0], expected[f"{image_name}/tokens"], atol=2e-3)
        if name == "voc":
            np.testing.assert_allclose(attention[0], expected[f"{image_name}/weights"], atol=5e-4)
        coarse = class_probabilities(tokens[:, 1:], text, plain.logit_scale)
        np.testing.assert_allclose(coarse[0], expected[f"{prefix}/coarse"], atol=2e-3)
        np.testing.assert_allclose((attention @ coarse)[0], expected[f"{prefix}/first"], atol=5e-4)
        refined = refined_probabilities(coarse, attention, grid, settings)[0]
        np.testing.assert_allclose(refined, expected[f"{prefix}/refined"], atol=5e-4)
        class_ids = candidates(refined, classes, settings.ratio)
        assert class_ids == expected[f"{prefix}/candidates"].tolist()
        [tags] = tag_images(plain, [pixels], text, classes, settings)
        assert list(tags.reidentified) == class_ids[: int(expected[f"{prefix}/reidentified"])]
        np.testing.assert_allclose(tags.scores, expected[f"{prefix}/scores"], atol=5e-4)


def test_vit_b16_matches_golden(parity_file):
    expected = golden("vit_b16")
    model = clip.load(parity_file("vit_b16", 0), "cpu", round_weights=False)
    text = torch.from_numpy(weights.parity_array("tagclip-text", (24, 512), seed=0))
    text = text / text.norm(dim=1, keepdim=True)
    pixels, settings = resized(image("tagclip-v0", (70, 96))), TagSettings()
    tokens, attention, grid = patch_level(model.visual, network_input(pixels), settings)
    np.testing.assert_allclose(tokens[0, :, ::8], expected["tokens"], atol=2e-3)
    np.testing.assert_allclose(attention[0], expected["weights"], atol=5e-4)
    coarse = class_probabilities(tokens[:, 1:], text, model.logit_scale)
    np.testing.assert_allclose(coarse[0], expected["coarse"], atol=2e-3)
    refined = refined_probabilities(coarse, attention, grid, settings)[0]
    np.testing.assert_allclose(refined, expected["refined"], atol=5e-4)
    assert candidates(refined, 24, settings.ratio) == expected["candidates"].tolist()
    [tags] = tag_images(model, [pixels], text, 24, settings)
    np.testing.assert_allclose(tags.scores, expected["scores"], atol=5e-4)
    np.testing.assert_allclose(tags.maps.max((1, 2)), expected["local"], atol=5e-4)
    assert len(tags.reidentified) == int(expected["reidentified"])


@pytest.mark.parametrize(("name", "classes"), [("one", 1), ("two", 2), ("many", 100)])
def test_other_class_lists_match_golden(tiny, name, classes):
    expected = golden("class_lists")
    features = {}
    for key, (_, names, _) in SETS.items():
        features |= dict(zip(names, text_of(key), strict=True))
    text = torch.stack([features[name] for name in expected[f"{name}/names"].tolist()])
    for row, image_name in enumerate(("tagclip-0", "tagclip-1", "tagclip-2", "tagclip-3")):
        [tags] = tag_images(tiny, [resized(image(image_name))], text, classes, TagSettings())
        refined = expected[f"{name}/{image_name}/refined"][:, :classes].T
        np.testing.assert_allclose(tags.maps.reshape(classes, -1), refined, atol=5e-4)
        np.testing.assert_allclose(tags.scores, expected[f"{name}/scores"][row], atol=5e-4)


def test_batched_equals_single_images(tiny):
    """The images have several sizes, some equal, and all have crops."""
    classes, _, settings = SETS["coco"]
    sizes = [(97, 130), (64, 64), (97, 130), (160, 112), (64, 64), (97, 130), (160, 112), (33, 100)]
    images = [resized(image(f"batched-{number}", size)) for number, size in enumerate(sizes)]
    text = text_of("coco")
    together = tag_images(tiny, images, text, classes, settings)
    crops_found = 0
    for pixels, tags in zip(images, together, strict=True):
        [alone] = tag_images(tiny, [pixels], text, classes, settings)
        np.testing.assert_allclose(tags.scores, alone.scores, atol=1e-5)
        np.testing.assert_allclose(tags.maps, alone.maps, atol=1e-5)
        assert list(tags.reidentified) == list(alone.reidentified)
        crops_found += len(alone.reidentified)
    assert crops_found > len(images)


def test_images_of_one_size_and_all_crops_are_batched(tiny, monkeypatch):
    passes = {"patch_level": [], "class_tokens": []}
    for name, sizes in passes.items():
        work = getattr(tagging, name)
        monkeypatch.setattr(
            tagging, name, lambda visual, images, *more, work=work, sizes=sizes: (
                sizes.append(len(images)) or work(visual, images, *more)
            )
        )  # fmt: skip
    sizes = [(97, 130) if number % 3 else (64, 64) for number in range(8)]
    images = [resized(image(f"batched-{number}", size)) for number, size in enumerate(sizes)]
    tags = tag_images(tiny, images, text_of("coco"), 80, TagSettings())
    crops_found = sum(len(tag.reidentified) for tag in tags)
    assert crops_found > 8 and passes == {"patch_level": [3, 5], "class_tokens": [crops_found]}


@pytest.mark.parametrize("size", [(64, 304), (304, 64), (32, 608), (16, 1216)])
def test_76_patches_get_the_mask_of_the_last_block(tiny, size):
    """77 tokens are also the length of a text. With the mask of the last block, the output for a patch does
    not depend on other patches."""
    settings, pixels = TagSettings(), network_input(resized(image("long", size)))
    tokens, grid = tiny.visual.embed(pixels, "resampled")
    assert tokens.shape[1] == 77
    *_, (before, _) = tiny.visual.blocks(tokens, stop=-1)
    mask = torch.full((77, 77), settings.diagonal_bias).fill_diagonal_(0)
    changed = before.clone()
    changed[:, 40] += 1
    outputs = {}
    for name, entering in (("before", before), ("changed", changed)):
        outputs[name] = tiny.visual.project(tiny.visual.block(-1, entering, mask)[0])
    different = (outputs["before"] != outputs["changed"]).any(-1)[0]
    assert different.nonzero().flatten().tolist() == [40]
    level = patch_level(tiny.visual, pixels, settings)
    torch.testing.assert_close(level.tokens, outputs["before"].detach(), atol=1e-4, rtol=0)
    unmasked = tiny.visual.project(tiny.visual.block(-1, before)[0])
    assert (unmasked - outputs["before"]).abs().max() > 0.1
    [tags] = tag_images(tiny, [resized(image("long", size))], text_of("voc"), 20, settings)
    assert np.isfinite(tags.scores).all() and tags.maps.shape[1:] == grid


@pytest.mark.parametrize("size", [(16, 16), (5, 9)])
def test_image_of_one_patch_scores_zero(tiny, size):
    [tags] = tag_images(tiny, [resized(image("small", size))], text_of("voc"), 20, TagSettings())
    assert tags.scores.tolist() == [0] * 20 and tags.reidentified == {}


def test_single_name_has_probability_1(tiny):
    text = text_of("voc")[:1]
    pixels = resized(image("tagclip-2"))
    tokens, *_ = patch_level(tiny.visual, network_input(pixels), TagSettings())
    assert (class_probabilities(tokens, text, tiny.logit_scale) == 1).all()
    [tags] = tag_images(tiny, [pixels], text, 1, TagSettings())
    assert 0 < tags.scores[0] <= 1


def test_constant_map_has_no_box():
    propagated = torch.full((1, 12, 3), 0.25)
    propagated[0, 5, 1] = 0.5
    propagated[0, :, 2] = 0
    boxes = class_boxes(propagated, (3, 4), TagSettings())
    assert boxes[0, :, 0].sum() == 0 and boxes[0, :, 2].sum() == 0
    assert boxes[0, :, 1].nonzero().flatten().tolist() == [5]
    assert not min_max_normalize(propagated)[..., 0].any()


def test_large_crop_is_not_antialiased(tiny):
    """A pixel is the bilinear mean of the four nearest pixels, with half-pixel centers."""
    pixels = network_input(resized(image("large", (480, 640))))[0].double()
    cells = np.zeros((24, 30), bool)
    cells[5:19, 3:] = True
    crop = Crop(3, (2, 5, 26, 35), cells)
    view, mask = cut(pixels, crop, 16, 224)
    region = pixels[:, 32:416, 80:560]  # (3, 384, 480)
    centers = torch.arange(224).double() + 0.5
    rows, columns = centers * 384 / 224 - 0.5, centers * 480 / 224 - 0.5
    y, x = rows.floor().long(), columns.floor().long()
    dy, dx = (rows - y)[:, None], columns - x
    top = region[:, y][:, :, x] * (1 - dx) + region[:, y][:, :, x + 1] * dx
    bottom = region[:, y + 1][:, :, x] * (1 - dx) + region[:, y + 1][:, :, x + 1] * dx
    torch.testing.assert_close(view, top * (1 - dy) + bottom * dy, atol=1e-9, rtol=0)
    smooth = F.interpolate(region[None], (224, 224), mode="bilinear", antialias=True)[0]
    assert (view - smooth).abs().max() > 0.1
    rows, columns = np.arange(14) * 24 // 14, np.arange(14) * 30 // 14
    np.testing.assert_array_equal(mask.view(14, 14), cells[rows][:, columns])


def test_empty_crop_ends_the_list_unless_skipped():
    """A crop in the last row only is empty, unless `include_edge`."""
    refined = torch.zeros(12, 4)
    refined[9, 0] = refined[1, 1] = refined[6, 2] = 1  # of 3 x 4 patches
    class_ids = [1, 0, 2]
    settings = TagSettings()
    default = crops(refined, (3, 4), class_ids, settings)
    assert [(crop.class_id, crop.box) for crop in default] == [(1, (0, 1, 1, 2))]
    skipping = replace(settings, skip_empty_crops=True)
    assert [crop.class_id for crop in crops(refined, (3, 4), class_ids, skipping)] == [1, 2]
    covering = replace(settings, include_edge=True)
    assert [crop.box for crop in crops(refined, (3, 4), class_ids, covering)] == [
        (0, 1, 1, 2), (2, 1, 3, 2), (1, 2, 2, 3),
    ]  # fmt: skip
    assert crops(refined, (3, 4), [3], covering) == []


def test_class_token_depends_only_on_patches_of_the_class(tiny):
    torch.manual_seed(0)
    pixels, cells = torch.randn(2, 3, 224, 224), torch.ones(2, 196, dtype=torch.bool)
    pixels[1] = pixels[0]
    cells[:, :98] = False  # the upper half
    settings = TagSettings()
    tokens = class_tokens(tiny.visual, pixels, cells, settings)
    assert torch.equal(tokens[0], tokens[1])
    cells[1] = True
    assert not torch.allclose(*class_tokens(tiny.visual, pixels, cells, settings), atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"affinity_layers": 0}, "affinity_layers must be a whole number, 1 or more, got 0"),
        ({"ratio": 1.5}, "ratio must be a number from 0 to 1, got 1.5"),
        ({"vote_threshold": -1.0}, "vote_threshold must be a number, 0 or more, got -1.0"),
        ({"diagonal_bias": 1.0}, "diagonal_bias must be a number, 0 or less, got 1"),
        ({"crop_bias": float("nan")}, "crop_bias must be a number, 0 or less, got nan"),
        ({"position_rounding": "up"}, "position_rounding must be one of"),
    ],
)
def test_setting_outside_its_range_is_an_error(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        TagSettings(**settings)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"voting_layers": 13}, "voting_layers is 13, but 12 blocks can vote"),
        ({"voting_layers": 3, "votes": 4}, "votes is 4, but 3 blocks can vote: give at most 3"),
        ({"crop_size": 100}, "crop_size 100 is not a multiple of the patch size 16"),
    ],
)
def test_setting_that_does_not_fit_the_model_is_an_error(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        TagSettings(**settings).check(layers=12, patch_size=16)


@pytest.mark.parametrize("layers", [2, 3, 4])
def test_shallow_towers_work_with_the_defaults(tmp_path, layers):
    small = model_of(dict(TINY12, vision_layers=layers, image_resolution=64), tmp_path)
    TagSettings().check(layers, 16)
    with pytest.raises(ValueError, match="has only one block: use a deeper ViT"):
        TagSettings().check(1, 16)
    [tags] = tag_images(small, [resized(image("tagclip-2"))], text_of("voc"), 20, TagSettings())
    assert np.isfinite(tags.scores).all() and tags.scores.max() > 0


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_clamps_large_biases(tmp_path, precision):
    file = write_model(tmp_path / "tiny12.pt")
    half = clip.load(file, "cpu", precision, round_weights=False)
    settings = TagSettings(diagonal_bias=-1e6, crop_bias=-1e6)
    [tags] = tag_images(half, [resized(image("tagclip-2"))], text_of("voc"), 20, settings)
    [expected] = tag_images(half, [resized(image("tagclip-2"))], text_of("voc"), 20, TagSettings())
    np.testing.assert_allclose(tags.scores, expected.scores, atol=1e-3)


def test_non_finite_features_are_an_error(tmp_path):
    broken = model_of(TINY12, tmp_path)
    broken.visual.proj[0, 0] = float("nan")
    with pytest.raises(ValueError, match="features are not finite"):
        tag_images(broken, [resized(image("tagclip-2"))], text_of("voc"), 20, TagSettings())


def test_blocks_and_votes_depend_on_the_depth():
    """The values for 12 blocks are the published ones."""
    settings = TagSettings()
    assert list(settings.averaged(12)) == [8, 9, 10] and settings.votes_needed(12) == 4
    assert list(settings.voters(12)) == list(range(12))
    assert list(settings.averaged(10)) == [6, 7, 8] and settings.votes_needed(10) == 4
    assert list(settings.averaged(3)) == [0, 1] and settings.votes_needed(3) == 1
    assert list(replace(settings, affinity_layers=None).averaged(12)) == list(range(11))
    assert list(replace(settings, voting_layers=2).voters(12)) == [10, 11]
