"""Network A, DeepLab-v2 with the multi-scale wrapper; and properties of both networks."""
from functools import cache

import pytest
import torch
import torch.nn.functional as F

from deeplab import model as network_a
from deeplab import resnet38 as network_b
from deeplab.model import build_v2, parameter_groups, rescale
from deeplab.resnet38 import build_r38
from tests.conftest import relative
from tests.deeplab.common import build_v1, fill_a, golden, input_a

SIZES = [(65, 65), (97, 65), (57, 81), (33, 34)]
SMALL = (1, 1, 1, 1)
NETS = {"full_21": (21, (3, 4, 23, 3)), "full_81": (81, (3, 4, 23, 3)), "small_1111_5": (5, SMALL)}


@cache
def net():
    return fill_a(build_v2(5, SMALL))


@cache
def pair():
    """Return two images (2, 3, 41, 57)."""
    return torch.cat([input_a("dl:b0", 41, 57), input_a("dl:b1", 41, 57)])


@pytest.fixture(scope="module")
def plain():
    return golden("a_net_plain")


@pytest.fixture(scope="module")
def msc():
    return golden("a_net_msc")


@torch.no_grad()
@pytest.mark.parametrize("position, size", list(enumerate(SIZES)))
def test_stages_and_outputs_match_golden(plain, msc, position, size):
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
    for scale, name in ((0.5, "half"), (0.75, "threequarter")):
        assert relative(rescale(image, scale)[:, :, -3:, -3:], msc[f"{key}_{name}"]) < 1e-4


@pytest.mark.parametrize("recording", [False, True])  # frozen batch norm is computed in two ways
@pytest.mark.parametrize("position, size", list(enumerate(SIZES)))
def test_training_outputs_match_golden(msc, position, size, recording):
    with torch.set_grad_enabled(recording):
        outputs = net().train()(input_a(f"dl:plain{position}", *size))
    expected = [msc["{}x{}_train{}".format(*size, number)] for number in range(4)]
    for output, other in zip(outputs, expected, strict=True):
        assert relative(output.detach(), other) < 1e-4


@torch.no_grad()
def test_other_heads_depths_and_batches_match_golden(plain, msc):
    image = input_a("dl:v2s", 49, 61)
    small_rates = fill_a(build_v2(3, (1, 2, 2, 1), rates=(3, 6, 9, 12)), seed=1)
    assert relative(small_rates.base(image), plain["v2s_1221_49x61_logits"]) < 1e-4
    shell = fill_a(build_v1(7, SMALL), seed=2, stem="layer1.conv1.conv.weight")
    assert relative(shell(image), plain["v1_49x61_logits"]) < 1e-4
    assert relative(net().eval().base(pair()), plain["batch2_41x57_logits"]) < 1e-4
    three = fill_a(build_v2(5, SMALL, scales=(0.5, 0.75, 1.25)))
    assert relative(three(pair()), msc["scales3_41x57_eval"]) < 1e-4


@torch.no_grad()
def test_live_batch_norm_matches_golden(msc):
    model = fill_a(build_v2(5, SMALL, freeze_bn=False)).train()
    for number, output in enumerate(model(pair())):
        assert relative(output, msc[f"live_bn_41x57_train{number}"]) < 2e-4
    norm = model.base.layer1.conv1.bn
    assert relative(norm.running_mean, msc["live_bn_stem_running_mean"]) < 2e-4
    assert relative(norm.running_var, msc["live_bn_stem_running_var"]) < 2e-4
    assert norm.num_batches_tracked == msc["live_bn_stem_count"]


@torch.no_grad()
def test_msc_without_scales_equals_the_base():
    model = fill_a(build_v2(5, SMALL, scales=(), width=4))
    logits = model.base(pair())
    assert torch.equal(model(pair()), logits)
    (output,) = model.train()(pair())
    assert torch.equal(output, logits)


@pytest.mark.parametrize("frozen, expected", [(True, 2), (False, 6)])
def test_frozen_batch_norm_stores_less_for_the_backward_pass(frozen, expected):
    """A block stores two results after ReLU; with live batch norm also the inputs of its four batch norms."""
    block = build_v2(3, SMALL, width=4, freeze_bn=frozen).base.layer2.block1
    x = torch.randn(1, 4, 8, 8)
    stored = {}

    def store(tensor):
        stored[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(store, lambda tensor: tensor):
        y = block(x)
    others = {tensor.untyped_storage().data_ptr() for tensor in (*block.parameters(), x, y)}
    maps = [t for key, t in stored.items() if key not in others and t.shape[-2:] == x.shape[-2:]]
    assert len(maps) == expected


@pytest.mark.parametrize("name", NETS)
def test_parameter_groups_match_golden(name):
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


def test_state_dict_matches_the_reference():
    expected = golden("state_dict_keys.json")
    with torch.device("meta"):
        v2, v1 = build_v2(21), build_v1(91)
    shapes = {key: list(value.shape) for key, value in v2.state_dict().items()}
    assert list(shapes.items()) == list(expected["deeplabv2_resnet101_msc_21"].items())
    shell = {key: list(value.shape) for key, value in v1.state_dict().items()}
    body = {key.removeprefix("base."): shape for key, shape in shapes.items() if "aspp" not in key}
    assert list(shell.items()) == [*body.items(), *expected["deeplabv1_resnet101_91_fc_only"].items()]


def test_head_is_initialized_with_std_0_01():
    torch.manual_seed(0)
    head = build_v2(5, SMALL, width=8).base.aspp
    assert relative(head.c0.weight.std().item(), 0.01) < 0.02
    assert not any(branch.bias.any() for branch in head.children())


def narrow_a(**settings):
    return build_v2(3, SMALL, rates=(1, 2), width=4, **settings)


def narrow_b(**settings):
    return build_r38(3, (1, 2, 1, 2), width=2, **settings)


BOTH = pytest.mark.parametrize("build, network", [(narrow_a, network_a), (narrow_b, network_b)])


def cells(side: int) -> int:
    """Return the side of network A's logits: three strides of 2; the second, Caffe's pooling, rounds up."""
    side = (side - 1) // 2 + 1
    pooled = side // 2 + 1
    pooled -= 2 * (pooled - 1) > side  # no window starts in the padding
    return (pooled - 1) // 2 + 1


def test_logit_sizes_match_caffe():
    assert [cells(side) for side in (321, 240, 160, 513)] == [41, 31, 21, 65]


@torch.no_grad()
@BOTH
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (2, 3), (7, 9), (33, 50)])
def test_network_works_at_any_size(build, network, size):
    torch.manual_seed(0)
    model = build().eval()
    logits = model(torch.randn(1, 3, *size))
    assert logits.shape == (1, 3, *(size if build is narrow_b else map(cells, size)))
    assert logits.isfinite().all()


@torch.no_grad()
@BOTH
def test_saved_network_loads_with_equal_logits(build, network, tmp_path):
    torch.manual_seed(0)
    model, other = build().eval(), build().eval()
    image = torch.randn(1, 3, 40, 30)
    assert not torch.equal(model(image), other(image))
    torch.save(model.state_dict(), tmp_path / "model.pth")
    other.load_state_dict(torch.load(tmp_path / "model.pth", weights_only=True))
    assert torch.equal(model(image), other(image))


@BOTH
@pytest.mark.parametrize("frozen", [False, True])
def test_only_grouped_parameters_and_live_statistics_change(build, network, frozen):
    """Parameters in a group get a gradient, others do not; frozen statistics do not change."""
    torch.manual_seed(0)
    model = build(freeze_bn=frozen).eval().train()
    before = {name: value.clone() for name, value in model.named_buffers()}
    outputs = model(torch.randn(2, 3, 33, 41))
    outputs = outputs if isinstance(outputs, list) else [outputs]
    sum(F.cross_entropy(output, torch.ones_like(output[:, 0]).long()) for output in outputs).backward()

    trained = {parameter for group in parameter_groups(model) for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        moved = parameter.grad is not None and bool(parameter.grad.any())
        assert moved == (parameter in trained) == parameter.requires_grad, name
        assert parameter.requires_grad != ("bn" in name or (frozen and "conv1a" in name)), name
    for name, value in model.named_buffers():
        live = not frozen or name.startswith("bn_fov")  # never frozen in network B's head
        assert torch.equal(before[name], value) != live, name


@pytest.mark.parametrize("wrong, message", [
    ({"blocks": (3, 4, 23)}, "blocks must be four"),
    ({"blocks": (1, 1, 0, 1)}, "blocks must be four"),
    ({"scales": (0.5, 0)}, "scales must be positive"),
    ({"rates": ()}, "rates is empty: the head requires at least one dilation rate"),
    ({"stride_in": "first"}, "stride_in must be one of reduce, conv3x3"),
])  # fmt: skip
def test_invalid_network_settings_are_an_error(wrong, message):
    with pytest.raises(ValueError, match=message):
        build_v2(3, **{"blocks": SMALL, "width": 1} | wrong)
    if "blocks" in wrong:
        with pytest.raises(ValueError, match=message):
            build_r38(3, width=1, **wrong)
