"""Grad-CAM and affinity against golden vectors, stage by stage."""
import numpy as np
import pytest
import torch

import clip
from pytorch_grad_cam import text_cams
from pytorch_grad_cam.affinity import box_mask, box_masks, refine, transition_matrix
from pytorch_grad_cam.grad_cam import encode, full_gradients, mean_gradients
from pytorch_grad_cam.methods import activation_map, min_max_normalize
from segmentation import benchmark as benchmarks
from segmentation.camfile import resize
from tests.conftest import CASES, golden, parity_image, relative


@pytest.fixture(params=CASES)
def case(request, parity_clip):
    """(golden arrays, model, images (1, 3, H', W'), label features (1, K, E), background features)."""
    name, size, preset, seed, data, labels = CASES[request.param]
    model, reference = parity_clip(preset, seed), golden(f"case_{request.param}")
    assert float(reference["threshold"]) == benchmarks.load(data).box_threshold
    features = torch.as_tensor(reference["text"])
    text, backgrounds = features[: len(labels)], features[len(labels) :]
    image = clip.preprocess(parity_image(name, size), clip.target_size(*size, model.visual.patch_size))
    return reference, model, image[None], text[None], backgrounds


def assert_labels_close(mine, reference, tolerance):
    """Compare each label relative to its own maximum, so that labels with small values are checked too."""
    assert len(mine) == len(reference)
    for label, (one, other) in enumerate(zip(mine, reference, strict=True)):
        assert relative(one, other) <= tolerance, f"label {label}"


def test_closed_form_and_automatic_gradients_match_golden(case):
    reference, model, images, text, backgrounds = case
    encoded = encode(model.visual, images)
    assert relative(encoded.tokens[0], reference["tokens"]) <= 1e-4
    activations, weights, probabilities, _ = mean_gradients(model, encoded.tokens, text, backgrounds)
    assert relative(probabilities[0], reference["probs"]) <= 3e-4
    assert relative(activations[0].mT.reshape(reference["act"].shape), reference["act"]) <= 1e-4
    assert_labels_close(weights[0], reference["weights"], 1e-3)
    activations, gradients, probabilities, _ = full_gradients(
        model, encoded.tokens, encoded.grid, text, backgrounds
    )
    assert relative(probabilities[0], reference["probs"]) <= 3e-4
    assert relative(activations[0], reference["act"]) <= 1e-4
    assert_labels_close(gradients[0], reference["grad"], 1e-3)
    assert_labels_close(gradients[0].mean((-2, -1)), reference["weights"], 1e-3)


def test_cams_match_golden(case):
    reference, model, images, text, backgrounds = case
    result = text_cams(model, images, text, backgrounds)
    assert_labels_close(result.raw[0], reference["raw"], 1e-3)
    assert np.abs(result.cams[0].numpy() - reference["cam"]).max() <= 5e-4
    assert relative(result.affinity[0], reference["attn_mean"]) <= 1e-4


def test_transition_matrix_matches_golden(case):
    reference = case[0]
    attention = torch.as_tensor(reference["attn_mean"])
    symmetric = transition_matrix(attention)
    assert relative(symmetric, reference["sym"]) <= 1e-4
    assert relative(symmetric @ symmetric, reference["affinity"]) <= 1e-4


def test_refined_cams_match_golden(case):
    reference, model, images, text, backgrounds = case
    result = text_cams(model, images, text, backgrounds)
    masks = box_masks(result.cams, float(reference["threshold"]))
    np.testing.assert_array_equal(masks[0], reference["mask"])
    refined = refine(result.cams, result.affinity, masks)
    assert relative(refined[0], reference["refined"]) <= 2e-4
    maps = resize(min_max_normalize(refined)[0].numpy(), reference["attn_highres"].shape[1:])
    assert np.abs(maps - reference["attn_highres"].astype(np.float32)).max() <= 1.5e-3


def test_activation_map_of_zero_and_tiny_cams_matches_golden(parity_clip):
    reference = golden("case_z")
    assert not reference["cam"][1].any() and 0 < reference["cam"][2].max() < 0.99999
    cams = activation_map(torch.as_tensor(reference["raw"])).numpy()
    assert np.abs(cams - reference["cam"]).max() <= 1e-6


def test_min_max_normalize_and_resize_match_golden():
    reference = golden("scaling")
    for key in ("plain", "tiny", "const", "zero", "row", "same", "down"):
        scaled = min_max_normalize(torch.as_tensor(reference[f"in_{key}"])).numpy()
        np.testing.assert_allclose(scaled, reference[f"scaled_{key}"], atol=1e-7)
        width, height = reference[f"size_wh_{key}"]
        resized = resize(scaled[None], (int(height), int(width)))[0]
        np.testing.assert_allclose(resized, reference[f"resized_{key}"], atol=1e-6)


@pytest.mark.parametrize(("data", "threshold"), [("voc", 0.4), ("coco", 0.7)])
def test_box_mask_matches_golden(data, threshold):
    reference = golden("boxes")
    maps = {key[4:]: value for key, value in reference.items() if key.startswith("map_")}
    assert len(maps) == 11
    for key, cam in maps.items():
        np.testing.assert_array_equal(box_mask(cam, threshold), reference[f"mask_{data}_{key}"], err_msg=key)


def test_box_mask_includes_the_edge_only_with_include_edge():
    cam = np.zeros((4, 5), np.float32)
    cam[3, 4] = cam[0, 0] = 1
    without_edge = np.zeros((4, 5))
    without_edge[0, 0] = 1
    np.testing.assert_array_equal(box_mask(cam, 0.4), without_edge)
    np.testing.assert_array_equal(box_mask(cam, 0.4, include_edge=True), cam)
