"""Network A: DeepLab-v2 with the multi-scale wrapper, and the shell of DeepLab-v1."""
from functools import cache

import pytest
import torch

from deeplab.model import DeepLabV1, build_v2, parameter_groups
from tests.conftest import relative
from tests.deeplab.common import fill_a, golden, input_a

SIZES = [(65, 65), (97, 65), (57, 81), (33, 34)]
SMALL = (1, 1, 1, 1)
NETS = {"full_21": (21, (3, 4, 23, 3)), "full_81": (81, (3, 4, 23, 3)), "small_1111_5": (5, SMALL)}


@cache
def net():
    return fill_a(build_v2(5, SMALL))


@cache
def pair():
    """(2, 3, 41, 57)."""
    return torch.cat([input_a("dl:b0", 41, 57), input_a("dl:b1", 41, 57)])


@pytest.fixture(scope="module")
def plain():
    return golden("a_net_plain")


@pytest.fixture(scope="module")
def msc():
    return golden("a_net_msc")


@torch.no_grad()
@pytest.mark.parametrize("position, size", list(enumerate(SIZES)))
def test_every_stage_and_every_output(plain, msc, position, size):
    key = "{}x{}".format(*size)
    image = x = input_a(f"dl:plain{position}", *size)
    for number in range(1, 6):
        x = getattr(net().base, f"layer{number}")(x)
        assert x.shape == tuple(plain[f"{key}_layer{number}_shape"])
        stats = torch.stack([x.mean(), x.std(correction=0), x.abs().max()])
        assert relative(stats, plain[f"{key}_layer{number}_stats"]) < 1e-4
        crop = x[0, :: x.shape[1] // 16, :4, -4:]
        assert relative(crop, plain[f"{key}_layer{number}_crop"]) < 1e-4
    assert relative(net().base.aspp(x), plain[f"{key}_logits"]) < 1e-4
    if position == len(SIZES) - 1:
        for number, branch in enumerate(net().base.aspp.children()):
            assert relative(branch(x), plain[f"last_aspp_branch{number}"]) < 1e-4

    assert relative(net().eval()(image), msc[f"{key}_eval"]) < 1e-4
    for number, output in enumerate(net().train()(image)):
        assert relative(output, msc[f"{key}_train{number}"]) < 1e-4
    assert number == 3
    net().eval()


@pytest.mark.parametrize("name", NETS)
def test_parameter_groups(name):
    channels, blocks = NETS[name]
    expected = golden("a_param_groups.json")[name]
    with torch.device("meta"):
        model = build_v2(channels, blocks)
    names = {parameter: key for key, parameter in model.named_parameters()}
    groups = parameter_groups(model)
    assert [(g["rate"], g["weight_decay"]) for g in groups] == [(1, True), (10, True), (20, False)]
    for group in groups:
        assert summarised(group["params"], names) == expected[f"{group['rate']}x"]
    assert all(parameter.requires_grad for group in groups for parameter in group["params"])
    assert {"tensors": len(names), "elements": sum(p.numel() for p in names)} == expected["parameters"]
    assert len(model.state_dict()) == expected["state_dict_entries"]


def summarised(parameters, names):
    return {
        "tensors": len(parameters),
        "elements": sum(parameter.numel() for parameter in parameters),
        "first": names[parameters[0]],
        "last": names[parameters[-1]],
    }


def test_state_dict_is_the_public_one():
    expected = golden("state_dict_keys.json")
    with torch.device("meta"):
        v2, v1 = build_v2(21), DeepLabV1(91)
    found = {key: list(value.shape) for key, value in v2.state_dict().items()}
    assert list(found.items()) == list(expected["deeplabv2_resnet101_msc_21"].items())
    shell = {key: list(value.shape) for key, value in v1.state_dict().items()}
    body = {key.removeprefix("base."): shape for key, shape in found.items() if "aspp" not in key}
    assert list(shell.items()) == [*body.items(), *expected["deeplabv1_resnet101_91_fc_only"].items()]
