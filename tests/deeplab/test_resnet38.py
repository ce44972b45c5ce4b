"""Network B, DeepLab-v1 on ResNet-38d. One golden network has full width, the others a sixteenth of it."""
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from deeplab.model import parameter_groups
from deeplab.resnet38 import build_r38
from tests.conftest import relative
from tests.deeplab.common import golden, input_b
from tests.weights import fill_module

SIZES = [(33, 33), (49, 65), (60, 42)]


@cache
def net():
    return fill_module(build_r38(5, width=4)).eval()


@pytest.fixture(scope="module")
def expected():
    return golden("b_net")


@torch.no_grad()
@pytest.mark.parametrize("position, size", list(enumerate(SIZES)))
def test_stages_and_logits_match_golden(expected, position, size):
    key = "{}x{}".format(*size)
    image = input_b(f"r38:n{position}", *size)
    for name, stage in zip(("conv4", "conv5", "conv6"), net().backbone.stages(image), strict=True):
        assert stage.shape == tuple(expected[f"{key}_{name}_shape"])
        assert relative(stage[0, ::4], expected[f"{key}_{name}"]) < 1e-4
    assert relative(net()(image), expected[f"{key}_logits"]) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("frozen, tolerance", [(False, 5e-4), (True, 1e-4)])
def test_training_mode_matches_golden(expected, frozen, tolerance):
    model = fill_module(build_r38(5, width=4, freeze_bn=frozen)).train()
    for part in model.modules():
        if isinstance(part, nn.Dropout | nn.Dropout2d):
            part.p = 0
    before = model.backbone.bn7.running_mean.clone()
    logits = model(torch.cat([input_b("r38:b0", 33, 33), input_b("r38:b1", 33, 33)]))
    key = "train_frozen" if frozen else "train_live"
    assert relative(logits, expected[f"{key}_logits"]) < tolerance
    assert relative(model.backbone.bn7.running_mean, expected[f"{key}_bn7_running_mean"]) < 1e-4
    assert relative(model.bn_fov.running_var, expected[f"{key}_bn_fov_running_var"]) < 1e-4
    assert torch.equal(before, model.backbone.bn7.running_mean) == frozen


@torch.no_grad()
def test_full_width_matches_golden():
    full = golden("b_net_full")
    with torch.device("meta"):
        model = build_r38(21)
    model = fill_module(model.to_empty(device="cpu"), 3).eval()
    image = input_b("r38:full", 33, 49)
    for name, stage in zip(("conv4", "conv5", "conv6"), model.backbone.stages(image), strict=True):
        assert stage.shape == tuple(full[f"{name}_shape"])
        stats = torch.stack([stage.mean(), stage.std(correction=0), stage.abs().max()])
        assert relative(stats, full[f"{name}_stats"]) < 1e-4
        assert relative(stage[0, :: stage.shape[1] // 16], full[f"{name}_slice"]) < 1e-4
    assert relative(model(image)[:, ::4], full["logits"]) < 1e-4


@pytest.mark.parametrize("frozen, key", [(False, "before"), (True, "after")])
def test_parameter_groups_match_the_reference(frozen, key):
    keys = golden("state_dict_keys.json")
    body, biases, weights, bias = keys[f"resnet38_groups_{key}_train_call"]
    with torch.device("meta"):
        model = build_r38(21, freeze_bn=frozen)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model)
    rules = [(group["rate"], group["weight_decay"]) for group in groups]
    assert rules == [(1, True), (10, True), (20, False)]  # the backbone has no biases
    grouped = [[names[parameter] for parameter in group["params"]] for group in groups]
    assert biases == [] and grouped[1:] == [weights, bias]
    assert (body["tensors"], body["first"], body["last"]) == (len(grouped[0]), grouped[0][0], grouped[0][-1])
    assert body["elements"] == sum(parameter.numel() for parameter in groups[0]["params"])
    assert all(parameter.requires_grad for group in groups for parameter in group["params"])
    total = {"tensors": len(names), "elements": sum(parameter.numel() for parameter in names)}
    assert total == keys["resnet38_parameters"]


def test_state_dict_matches_the_reference():
    with torch.device("meta"):
        model = build_r38(21)
    shapes = [(key, list(value.shape)) for key, value in model.state_dict().items()]
    assert shapes == list(golden("state_dict_keys.json")["deeplabv1_resnet38_21"].items())


def test_head_has_kaiming_initialization():
    """SEAM's head: fan out, ReLU. PyTorch's default initialization has a third of the standard deviation."""
    torch.manual_seed(0)
    head = build_r38(5, width=8).conv_fov.weight
    assert np.isclose(head.std().item(), (2 / (64 * 9)) ** 0.5, rtol=0.02)


def test_dropout_rates_are_the_published_ones():
    model = build_r38(3, (1, 1, 1, 1), width=1)
    drops = nn.Dropout | nn.Dropout2d
    rates = {name: part.p for name, part in model.named_modules() if isinstance(part, drops)}
    assert rates == {
        "backbone.b6.dropout_2b1": 0.3,
        "backbone.b6.dropout_2b2": 0.3,
        "backbone.b7.dropout_2b1": 0.5,
        "backbone.b7.dropout_2b2": 0.5,
        "dropout1": 0.5,
    }
