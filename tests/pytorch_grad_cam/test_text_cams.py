"""Text-driven Grad-CAM: batches, padding, all methods, ResNet towers, affinities, half precision."""
import math

import pytest
import torch
import torch.nn.functional as F

from clip.model import CLIP, Config
from pytorch_grad_cam import METHODS, text_cams
from pytorch_grad_cam.affinity import refine
from pytorch_grad_cam.grad_cam import encode, feature_gradients, full_gradients, mean_gradients
from tests.clip.test_checkpoint import SMALL_RESNET, SMALL_VIT


def network(config: Config, scale: float = 2.0) -> CLIP:
    """A network with random weights. They are large enough that CAM values exceed rounding errors."""
    torch.manual_seed(3)
    model = CLIP(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.startswith("visual.") and parameter.dim() > 1:
            parameter.mul_(scale)
    return model


def features(count: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, width, generator=generator), dim=-1)


@pytest.mark.parametrize("config", [SMALL_VIT, SMALL_RESNET])
@pytest.mark.parametrize("method", METHODS)
def test_batches_and_padding_do_not_change_results(config, method):
    model = network(config, 1.0)
    images, text, backgrounds = torch.randn(3, 3, 64, 96), features(9, 32), features(4, 32, 1)
    rows = [[0, 1, 2], [3], [4, 5]]
    padded = torch.zeros(3, 3, 32)
    valid = torch.zeros(3, 3, dtype=torch.bool)
    for image, labels in enumerate(rows):
        padded[image, : len(labels)] = text[labels]
        valid[image, : len(labels)] = True
    batch = text_cams(model, images, padded, backgrounds, valid, method)
    for image, labels in enumerate(rows):
        single = text_cams(model, images[image : image + 1], text[labels][None], backgrounds, method=method)
        torch.testing.assert_close(batch.cams[image, : len(labels)], single.cams[0], rtol=0, atol=2e-4)
        assert not batch.cams[image, len(labels) :].any()
        if single.affinity is not None:
            torch.testing.assert_close(batch.affinity[image], single.affinity[0])
        probabilities = batch.probabilities[image][torch.cat([valid[image], torch.ones(4, dtype=torch.bool)])]
        torch.testing.assert_close(probabilities, single.probabilities[0])


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("size", [(8, 8), (8, 40), (24, 32)])
def test_closed_form_equals_the_mean_of_automatic_gradients(activation, size):
    config = Config(32, 32, 3, 128, 8, 77, 49408, 64, 1, activation)
    model = network(config).double()
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)):
        norm.weight.add_(0.1 * torch.randn_like(norm.weight))
    model = model.float()
    images, text, backgrounds = torch.randn(2, 3, *size), features(4, 32).view(2, 2, 32), features(3, 32, 1)
    encoded = encode(model.visual, images)
    _, weights, probabilities, attention = mean_gradients(model, encoded.tokens, text, backgrounds)
    _, gradients, expected, expected_attention = full_gradients(
        model, encoded.tokens, encoded.grid, text, backgrounds
    )
    torch.testing.assert_close(probabilities, expected)
    torch.testing.assert_close(attention, expected_attention)
    reference = gradients.mean((-2, -1))
    assert (weights - reference).abs().max() <= 1e-4 * reference.abs().max()


def test_closed_form_is_accurate_for_a_probability_near_1():
    """For p near 1 the difference logit_k - sum_j p_j logit_j is much smaller than its terms."""
    model = network(Config(32, 32, 3, 128, 8, 77, 49408, 64, 1))
    images, backgrounds = torch.randn(1, 3, 32, 56), features(3, 32, 1)
    pooled = mean_feature(model, images)
    text = F.normalize(pooled + torch.tensor([[0.4], [0.8]]) * features(2, 32, 2), dim=-1)[None]
    first, second = (text[0] @ pooled).tolist()
    model.logit_scale.fill_(math.log(8 / (first - second)))  # p of the second: about e^-8
    tokens = encode(model.visual, images).tokens
    _, weights, probabilities, _ = mean_gradients(model, tokens, text, backgrounds)
    assert 0.999 < probabilities.max() < 1
    _, gradients, _, _ = full_gradients(model, tokens, (4, 7), text, backgrounds)
    reference = gradients.mean((-2, -1))
    for label in range(2):
        difference = (weights - reference)[0, label].abs().max()
        assert difference <= 1e-4 * reference[0, label].abs().max()


@pytest.mark.parametrize("method", ["gradcam", "layercam"])
@pytest.mark.parametrize(("layers", "without"), [(1, False), (2, False), (8, False), (2, True), (8, True)])
def test_affinity_is_the_mean_attention_of_the_last_blocks(layers, without, method):
    model = network(SMALL_VIT)
    images = torch.randn(1, 3, 24, 16)
    text, backgrounds = features(1, 32)[None], features(2, 32, 1)
    result = text_cams(
        model, images, text, backgrounds, method=method, affinity_layers=layers, exclude_last_layer=without
    )
    tokens, _ = model.visual.embed(images)
    maps = []
    for index in range(model.visual.layers):
        tokens, attention = model.visual.block(index, tokens, need_weights=True)
        maps.append(attention)
    chosen = maps[-layers:-1] if without else maps[-layers:]
    expected = torch.stack(chosen).mean(0)[:, 1:, 1:]
    torch.testing.assert_close(result.affinity, expected)


@pytest.mark.parametrize("method", ["gradcam", "layercam"])
def test_affinity_function_replaces_attention(method, monkeypatch):
    """The result contains its matrix and the same CAMs. The first block computes no attention weights."""
    model = network(SMALL_VIT)
    images, backgrounds = torch.randn(2, 3, 24, 16), features(2, 32, 1)
    text = features(2, 32).expand(2, -1, -1)
    default = text_cams(model, images, text, backgrounds, method=method)

    def clip_attention(images):
        tokens, _ = model.visual.embed(images)
        weights = [attention for _, attention in model.visual.blocks(tokens, need_weights=True)]
        return torch.stack(weights).mean(0)[:, 1:, 1:]

    own = text_cams(model, images, text, backgrounds, method=method, affinity=clip_attention)
    torch.testing.assert_close(own.affinity, default.affinity)
    torch.testing.assert_close(own.cams, default.cams)
    first = model.visual.transformer.resblocks[0].attn
    monkeypatch.setattr(first, "attend", None)  # a call would fail
    identity = torch.eye(6).expand(2, -1, -1)
    own = text_cams(model, images, text, backgrounds, method=method, affinity=lambda images: identity)
    assert own.affinity is identity
    torch.testing.assert_close(refine(own.cams, own.affinity), default.cams)
    with pytest.raises(ValueError, match=r"affinity returned shape \(6, 6\), expected \(2, 6, 6\)"):
        text_cams(model, images, text, backgrounds, method=method, affinity=lambda images: identity[0])


def test_affinity_of_a_resnet_is_none_without_a_function():
    model, identity = network(SMALL_RESNET, 1.0), torch.eye(6)[None]
    arguments = model, torch.randn(1, 3, 64, 96), features(2, 32)[None], features(2, 32, 1)
    assert text_cams(*arguments).affinity is None
    assert text_cams(*arguments, affinity=lambda images: identity).affinity is identity


def test_excluding_the_only_averaged_block_raises():
    with pytest.raises(ValueError, match=r"affinity_layers 1 no block remains .*: set affinity_layers to 2"):
        text_cams(
            network(SMALL_VIT),
            torch.randn(1, 3, 24, 16),
            *(features(1, 32)[None], features(2, 32, 1)),
            affinity_layers=1,
            exclude_last_layer=True,
        )


def test_improbable_labels_do_not_underflow_in_half_precision():
    """A label of probability about 1e-10: the gradient of the probability itself would be 0 in float16."""
    model = network(SMALL_VIT, 1.0)
    model.logit_scale.fill_(2.5)
    images, backgrounds = torch.randn(1, 3, 32, 48), features(3, 32, 1)
    pooled = mean_feature(model, images)
    text = F.normalize(torch.stack([pooled, -pooled]) + 0.3 * features(2, 32, 2), dim=-1)[None]
    full = text_cams(model, images, text, backgrounds)
    assert full.probabilities[0, 1] < 1e-9
    model.visual_precision(torch.float16)
    for method in ("gradcam", "layercam"):
        assert text_cams(model, images, text, backgrounds, method=method).raw[0, 1].abs().max() > 0
    half = text_cams(model, images, text, backgrounds)
    mine, reference = (F.normalize(cams.raw[0].flatten(1), dim=-1, eps=1e-30) for cams in (half, full))
    assert (mine * reference).sum(-1).min() > 0.99


def mean_feature(model, images):
    tokens, _ = model.visual.embed(images)
    for index in range(model.visual.layers):
        tokens, _ = model.visual.block(index, tokens)
    return F.normalize(model.visual.project(tokens[0, 1:]).mean(0), dim=-1)


def test_resnet_gradients_equal_automatic_gradients_of_the_probability():
    model = network(SMALL_RESNET, 1.0)
    stage = model.visual.stages(torch.randn(1, 3, 64, 96))
    text, backgrounds = features(2, 32)[None], features(3, 32, 1)
    gradients, probabilities = feature_gradients(model, stage, text, backgrounds)
    stage = stage.clone().requires_grad_()
    feature = F.normalize(model.visual.attnpool(stage), dim=-1)
    logits = model.logit_scale.exp() * feature @ torch.cat([text[0], backgrounds]).T
    expected = logits.softmax(-1)
    torch.testing.assert_close(probabilities, expected)
    for label in range(2):
        (gradient,) = torch.autograd.grad(expected[0, label], stage, retain_graph=True)
        assert (gradients[0, label] - gradient[0]).abs().max() <= 1e-4 * gradient.abs().max()


def test_text_cams_leaves_no_hooks_or_gradients_in_the_model():
    model = network(SMALL_VIT)
    keys = set(model.state_dict())
    text_cams(model, torch.randn(1, 3, 16, 16), features(2, 32)[None], features(2, 32, 1), method="layercam")
    assert set(model.state_dict()) == keys
    for module in model.modules():
        assert not module._forward_hooks and not module._backward_hooks
    for parameter in model.parameters():
        assert parameter.grad is None and not parameter.requires_grad


def test_unknown_method_raises():
    model, text = network(SMALL_VIT), features(1, 32)
    with pytest.raises(ValueError, match="CAM method must be one of gradcam"):
        text_cams(model, torch.randn(1, 3, 8, 8), text[None], text, method="x")
