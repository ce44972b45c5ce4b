"""GradCAM for models and layers of all kinds: what is accepted, and one-line errors for the rest."""
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pytorch_grad_cam import ClassifierOutputTarget, GradCAM
from pytorch_grad_cam.methods import METHODS, principal_component
from pytorch_grad_cam.utils.model_targets import (
    BinaryClassifierOutputTarget,
    ClassifierOutputSoftmaxTarget,
    RawScoresOutputTarget,
    SemanticSegmentationTarget,
)
from pytorch_grad_cam.utils.reshape_transforms import vit_reshape_transform

IMAGES = torch.rand(2, 3, 12, 16, generator=torch.Generator().manual_seed(0))
TARGETS = [ClassifierOutputTarget(1), ClassifierOutputTarget(2)]
Heads = namedtuple("Heads", "logits auxiliary")


@dataclass
class Output:
    logits: Tensor
    loss: Tensor | None = None


class Small(nn.Module):
    """Convolution, ReLU, spatial mean, linear layer; functions change what flows between them."""

    def __init__(self, give=lambda scores: scores, classes=4, before=lambda x: x, between=lambda x: x):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.unused, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Linear(8, classes)
        self.relu = nn.ReLU(inplace=True)
        self.give, self.before, self.between = give, before, between

    def forward(self, images):
        return self.give(self.fc(self.between(self.relu(self.conv(self.before(images)))).mean((2, 3))))


class Layer(nn.Module):
    """A layer that computes a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def cams_of(model, targets=TARGETS, images=IMAGES, layer="conv", **settings):
    return GradCAM(model, [model.get_submodule(layer)], **settings)(images, targets)


def raises(message, function, *arguments, error=ValueError, **settings):
    """Check that a call raises an error of one line that contains `message`."""
    with pytest.raises(error) as info:
        function(*arguments, **settings)
    assert message in str(info.value) and "\n" not in str(info.value)


PLAIN = cams_of(Small())


@pytest.mark.parametrize(
    "give",
    [
        lambda scores: (scores, scores.mean()),
        lambda scores: (scores.mean(), scores),
        lambda scores: [scores.argmax(1), scores],
        lambda scores: (scores, scores[:, :2]),
        lambda scores: {"out": scores, "aux": 0 * scores},
        lambda scores: OrderedDict(loss=scores.mean(), logits=scores),
        lambda scores: Heads(scores, 0 * scores),
        Output,
        lambda scores: SimpleNamespace(name="classifier", logits=scores),
    ],
)
def test_output_is_the_first_tensor_with_an_entry_per_image(give):
    np.testing.assert_array_equal(cams_of(Small(give)), PLAIN)


def test_output_function_selects_the_output():
    model = Small(lambda scores: {"other": 0 * scores, "heads": [scores]})
    np.testing.assert_array_equal(cams_of(model, output=lambda result: result["heads"][0]), PLAIN)


def test_outputs_of_a_detection_model_are_the_dicts_of_the_images():
    model = Small(lambda scores: [{"boxes": row[:0], "scores": row} for row in scores])
    targets = [lambda boxes: boxes["scores"][1], lambda boxes: boxes["scores"][2]]
    np.testing.assert_array_equal(cams_of(model, targets), PLAIN)
    raises("Pass one target per image", cams_of, model, None)


@pytest.mark.parametrize(
    "give, message",
    [
        (lambda scores: None, "the model gives NoneType for a batch of 2 images"),
        (lambda scores: {"head": {"logits": scores}}, "the model gives dict (head: dict)"),
        (lambda scores: scores.sum(), "the model gives a tensor of shape ()"),
        (lambda scores: scores.flatten(), "the model gives a tensor of shape (8,)"),
        (lambda scores: scores.argmax(1), "the model gives a tensor of shape (2,), torch.int64"),
        (
            lambda scores: (scores, 0 * scores),
            "tuple (0: (2, 4), 1: (2, 4)), several outputs of the same shape",
        ),
        (lambda scores: [scores] * 9, "5: (2, 4), ...), several outputs of the same shape"),
    ],
)
def test_other_outputs_raise(give, message):
    raises(message, cams_of, Small(give))
    raises("GradCAM(..., output=function)", cams_of, Small(give))


def test_output_function_that_does_not_fit_raises():
    model = Small(lambda scores: {"out": scores})
    raises(
        "output fails on dict (out: (2, 4)): KeyError: 'logits'", cams_of, model, output=lambda x: x["logits"]
    )
    raises("the model gives NoneType", cams_of, model, output=lambda x: None)


@pytest.mark.parametrize("give", [lambda scores: scores, lambda scores: scores[:, 0]])
def test_single_score_needs_no_target(give):
    expected = cams_of(Small(classes=1), [ClassifierOutputTarget(0)] * 2)
    np.testing.assert_array_equal(cams_of(Small(give, classes=1), None), expected)


def test_scores_of_pixels_need_targets():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1))
    raises("the model gives a tensor of shape (2, 4, 12, 16)", cams_of, model, None, layer="0")
    raises("use SemanticSegmentationTarget", cams_of, model, layer="0")
    mask = np.zeros((12, 16), bool)
    mask[2:5, 3:9] = True
    cams = cams_of(model, [SemanticSegmentationTarget(2, mask)] * 2, layer="0")
    by_hand = cams_of(model, [lambda scores: scores[2, 2:5, 3:9].sum()] * 2, layer="0")
    np.testing.assert_allclose(cams, by_hand, atol=1e-6)
    raises(
        "the mask has the shape (3, 16)",
        cams_of,
        model,
        [SemanticSegmentationTarget(2, mask[:3])] * 2,
        layer="0",
    )
    raises("class 4 is outside 0..3", cams_of, model, [SemanticSegmentationTarget(4, mask)] * 2, layer="0")


def test_targets_compute_their_scores():
    scores = torch.tensor([1.0, 3.0, 2.0])
    assert ClassifierOutputTarget(np.int64(1))(scores) == 3
    assert ClassifierOutputSoftmaxTarget(1)(scores) == scores.softmax(0)[1]
    assert RawScoresOutputTarget()(scores[:1]) == 1 == -BinaryClassifierOutputTarget(0)(scores[:1])
    assert BinaryClassifierOutputTarget(1)(scores[1]) == 3


@pytest.mark.parametrize(
    "targets, error, message",
    [
        (
            [0, 1],
            TypeError,
            "targets[0] is 0, not a function of the output: for a class use ClassifierOutputTarget",
        ),
        (torch.tensor([0, 1]), TypeError, "targets[0] is tensor(0), not a function"),
        (np.zeros((2, 2000)), TypeError, "targets[0] is array([0., 0., 0."),
        (ClassifierOutputTarget(0), TypeError, "one function per image, got ClassifierOutputTarget"),
        (3, TypeError, "one function per image, got int"),
        (TARGETS * 2, ValueError, "4 targets for 2 images"),
        ([], ValueError, "0 targets for 2 images"),
        (
            [TARGETS[0], ClassifierOutputTarget(4)],
            ValueError,
            "targets[1] fails on a tensor of shape (4,): class 4",
        ),
        ([ClassifierOutputTarget(-1)] * 2, ValueError, "class -1 is outside 0..3"),
        ([ClassifierOutputSoftmaxTarget(4)] * 2, ValueError, "class 4 is outside 0..3"),
        ([ClassifierOutputTarget("cat")] * 2, ValueError, "a class must be an int, got 'cat'"),
        (
            [lambda scores: scores[9]] * 2,
            ValueError,
            "targets[0] fails on a tensor of shape (4,): IndexError",
        ),
        ([lambda scores: scores] * 2, ValueError, "targets[0] returns a tensor of shape (4,)"),
        ([lambda scores: scores[0].item()] * 2, ValueError, "targets[0] returns float"),
        ([lambda scores: scores[0].detach()] * 2, ValueError, "with gradient"),
    ],
)
def test_wrong_targets_raise(targets, error, message):
    raises(message, cams_of, Small(), targets, error=error)


@pytest.mark.parametrize(
    "images, error, message",
    [
        ((IMAGES, IMAGES), TypeError, "got tuple (0: (2, 3, 12, 16), 1: (2, 3, 12, 16)). For several"),
        ({"pixel_values": IMAGES}, TypeError, "got dict (pixel_values: (2, 3, 12, 16))"),
        (IMAGES.numpy(), TypeError, "got ndarray"),
        (IMAGES[0], ValueError, "got a tensor of shape (3, 12, 16); image[None] makes a batch"),
        (IMAGES[:0], ValueError, "got a tensor of shape (0, 3, 12, 16)"),
        ((IMAGES * 255).byte(), ValueError, "images must be float, got torch.uint8"),
        (
            IMAGES * torch.tensor([[[[1]]], [[[torch.nan]]]]),
            ValueError,
            "image 1: the score of targets[1] is nan",
        ),
    ],
)
def test_wrong_images_raise(images, error, message):
    raises(message, cams_of, Small(), images=images, error=error)


def test_model_with_several_inputs_raises():
    model = nn.Bilinear(3, 3, 4)
    raises(
        "its forward takes (input1: torch.Tensor, input2", GradCAM(model, [model]), IMAGES, error=TypeError
    )


class Tokens(nn.Module):
    """Patches, then layers that return tuples."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.lstm = nn.Conv2d(3, 8, 4, 4), nn.LSTM(8, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.first = Layer(lambda pair: pair[0])
        self.named = Layer(lambda tokens: {"length": 12, "tokens": tokens})
        self.fc = nn.Linear(8, 4)

    def forward(self, images):
        tokens = self.first(self.lstm(self.patches(images).flatten(2).mT))
        return self.fc(self.named(self.attention(tokens, tokens, tokens)[0])["tokens"].mean(1))


def grid(tokens):
    return tokens.mT.unflatten(-1, (3, 4))


def test_first_tensor_of_a_layer_is_used():
    cams = {
        layer: cams_of(Tokens(), layer=layer, reshape_transform=grid)
        for layer in ("lstm", "first", "attention", "named")
    }
    np.testing.assert_array_equal(cams["lstm"], cams["first"])  # the second layer returns the tensor alone
    np.testing.assert_array_equal(cams["attention"], cams["named"])
    assert cams["lstm"].any() and cams["attention"].any()


@pytest.mark.parametrize("pack", [lambda maps: maps + 0, lambda maps: (maps + 0, "maps")])
def test_output_of_a_layer_may_change_in_place(pack):
    torch.manual_seed(0)
    first = Layer(lambda result: result if isinstance(result, Tensor) else result[0])
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Layer(pack), first, nn.ReLU(), Layer(lambda x: x.mean((2, 3))))
    expected = cams_of(model, layer="1")
    model[3].inplace = True
    np.testing.assert_array_equal(cams_of(model, layer="1"), expected)


@pytest.mark.parametrize(
    "layer, settings, message",
    [
        ("unused", {}, "target layer unused (Conv2d) is not called by the model"),
        ("fc", {}, "target layer fc (Linear) gives a tensor of shape (2, 4): needed are maps (2, C, h, w)"),
        ("conv", {"reshape_transform": lambda x: x[0]}, "(8, 10, 14): needed are maps"),
        (
            "conv",
            {"reshape_transform": lambda x: None},
            "reshape_transform of target layer conv (Conv2d) gives NoneType",
        ),
        (
            "conv",
            {"reshape_transform": lambda x: x.reshape(2, 7, 7, 8)},
            "fails on a tensor of shape (2, 8, 10, 14)",
        ),
        (
            "conv",
            {"reshape_transform": vit_reshape_transform},
            "are not (B, 1 + 14 * 14, C): set height and width",
        ),
    ],
)
def test_unsuitable_layers_raise(layer, settings, message):
    raises(message, cams_of, Small(), layer=layer, **settings)


@pytest.mark.parametrize(
    "layer, message",
    [
        (nn.AdaptiveAvgPool2d(1), "gives a tensor of shape (2, 4, 1, 1), a single position"),
        (nn.Flatten(2), "gives a tensor of shape (2, 4, 192): needed are maps"),
        (
            Layer(lambda x: x.argmax(1)),
            "target layer 1 (Layer) gives a tensor of shape (2, 12, 16), torch.int64",
        ),
        (Layer(lambda x: None), "target layer 1 (Layer) gives NoneType"),
        (
            Layer(torch.no_grad()(lambda x: (x + 0, 1))),
            "gives tuple (0: (2, 4, 12, 16), 1: int): needed is a float",
        ),
        (
            Layer(lambda x: torch.cat([x, x])),
            "gives a tensor of shape (4, 4, 12, 16): needed are maps (2, C, h, w)",
        ),
        (Layer(lambda x: x * torch.nan), "image 0: target layer 1 (Layer) gives NaN or inf"),
    ],
)
def test_layers_without_suitable_maps_raise(layer, message):
    class Model(nn.Sequential):
        def forward(self, images):
            maps = self[0](images)
            side = self[1](maps)
            used = side.nan_to_num().sum() * 0 if isinstance(side, Tensor) and side.is_floating_point() else 0
            return maps.mean((2, 3)) + used

    raises(message, cams_of, Model(nn.Conv2d(3, 4, 3, padding=1), layer), layer="1")


def test_layer_that_does_not_affect_the_scores_raises():
    model = Small(lambda scores: torch.ones(2, 4, requires_grad=True) + 0)
    raises("no gradient of the targets reaches target layer fc (Linear)", cams_of, model, layer="fc")


def test_single_layer_and_module_list_are_accepted():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), Layer(lambda x: x.mean((2, 3))))
    expected = GradCAM(model, [model[0]])(IMAGES)
    np.testing.assert_array_equal(GradCAM(model, model[0])(IMAGES), expected)  # not its parts, one by one
    np.testing.assert_array_equal(GradCAM(model, nn.ModuleList(model[:1]))(IMAGES), expected)


@pytest.mark.parametrize(
    "layers, error, message",
    [
        ([], ValueError, "target_layers is empty: pass at least one layer"),
        (["conv"], TypeError, "target_layers[0] is of type str"),
        ("conv", TypeError, "target_layers[0] is of type str"),
        (None, TypeError, "target_layers must be a list of modules, got NoneType"),
    ],
)
def test_missing_layers_raise(layers, error, message):
    raises(message, GradCAM, Small(), layers, error=error)


def test_other_model_or_method_raises():
    raises(
        "model must be a torch.nn.Module, got function", GradCAM, lambda x: x, [nn.ReLU()], error=TypeError
    )
    raises("CAM method must be one of gradcam", GradCAM, Small(), [nn.ReLU()], method="scorecam")


@pytest.mark.parametrize("unused_call", [False, True])
def test_last_call_of_a_layer_that_affects_the_scores_is_used(unused_call):
    torch.manual_seed(0)
    one, two, shared, last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.ReLU()
    mean = Layer(lambda x: x.mean((2, 3)))
    expected = cams_of(nn.Sequential(one, shared, two, last, mean), layer="3")
    repeated = nn.Sequential(
        one, shared, two, shared, mean, Layer(lambda x: (x, unused_call and shared(x))[0])
    )
    np.testing.assert_array_equal(GradCAM(repeated, shared)(IMAGES, TARGETS), expected)


@pytest.mark.parametrize("fails", [False, True])
def test_train_mode_changes_neither_cams_nor_model(fails):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        Layer(lambda x: x.mean((2, 3))),
        nn.Dropout(),
        nn.Linear(8, 4),
    )
    expected = cams_of(model.eval(), layer="2")
    model.train()
    model[2].eval()  # a part that the user keeps in eval mode
    modes, state = (
        [m.training for m in model.modules()],
        {k: v.clone() for k, v in model.state_dict().items()},
    )
    if fails:
        raises("class 9", cams_of, model, [ClassifierOutputTarget(9)] * 2, layer="2")
    else:
        np.testing.assert_array_equal(cams_of(model, layer="2"), expected)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_mode_of_the_caller_and_of_a_frozen_part_before_the_layer_have_no_effect(context):
    model = Small()
    with context():
        images = IMAGES.clone()
        np.testing.assert_array_equal(cams_of(model, images=images), PLAIN)
    np.testing.assert_array_equal(cams_of(model, images=images), PLAIN)
    model.conv.forward = context()(model.conv.forward)
    np.testing.assert_array_equal(cams_of(model), PLAIN)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_model_that_computes_without_gradient_raises(context):
    raises(
        "no gradient of the targets reaches target layer conv", cams_of, Small(between=context()(torch.abs))
    )
    model = Small()
    model.forward = context()(model.forward)
    raises("the model gives an output without gradient: its forward uses torch.no_grad", cams_of, model)


def test_model_made_in_inference_mode_raises():
    with torch.inference_mode():
        model = Small()
    raises("the model uses tensors made under torch.inference_mode: build it", cams_of, model)


def test_frozen_model_whose_images_are_detached():
    model = Small(before=lambda images: images.detach()).requires_grad_(False)
    np.testing.assert_array_equal(cams_of(model), PLAIN)


def test_model_that_changes_its_input_in_place_leaves_the_images_as_they_are():
    images = IMAGES.clone()
    shifted = cams_of(Small(before=lambda x: x.sub_(0.5)), images=images)
    np.testing.assert_array_equal(images, IMAGES)
    np.testing.assert_array_equal(shifted, cams_of(Small(before=lambda x: x - 0.5)))


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-5), (torch.float16, 0.02), (torch.bfloat16, 0.1)], ids=str
)
def test_images_take_the_float_type_of_the_model(dtype, tolerance):
    cams = cams_of(Small().to(dtype))
    assert cams.dtype == np.float32
    np.testing.assert_allclose(cams, PLAIN, atol=tolerance)


def test_overflow_of_half_precision_raises():
    raises("half precision overflows: use float32", cams_of, Small().half(), images=IMAGES * 1e6)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_scripted_model_raises():
    model = torch.jit.trace(Small().eval(), IMAGES)
    raises("For a compiled or scripted model, pass the original model", GradCAM(model, [model.conv]), IMAGES)


@pytest.mark.parametrize("method", METHODS)
def test_eigen_smooth_is_the_first_principal_component(method):
    model = Small(between=lambda x: x * 1.5)
    cams = GradCAM(model, [model.conv], method=method)(IMAGES, TARGETS, eigen_smooth=True)
    assert cams.shape == (2, 12, 16) and cams.any()
    plain = GradCAM(model, [model.conv], method=method)(IMAGES, TARGETS, eigen_smooth=False)
    assert np.abs(cams - plain).max() > 0.01


def test_principal_component_equals_the_eigenvector_of_the_covariance():
    weighted = torch.randn(2, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    for maps, component in zip(weighted.double(), principal_component(weighted), strict=True):
        centered = maps.flatten(1) - maps.flatten(1).mean(1, keepdim=True)  # (C, n)
        direction = torch.linalg.eigh(centered @ centered.T)[1][:, -1]
        expected = (direction @ centered).unflatten(0, (5, 6))
        sign = torch.sign((expected * component).sum())
        torch.testing.assert_close(component.double(), sign * expected, atol=1e-5, rtol=1e-4)


def test_aug_smooth_and_eigen_smooth_are_combined():
    model = Small()
    cam = GradCAM(model, [model.conv])
    views = [cam(IMAGES * factor, TARGETS, eigen_smooth=True) for factor in (0.9, 1, 1.1)]
    views += [cam(IMAGES.flip(-1) * f, TARGETS, eigen_smooth=True)[..., ::-1] for f in (0.9, 1, 1.1)]
    smooth = cam(IMAGES, TARGETS, aug_smooth=True, eigen_smooth=True)
    np.testing.assert_allclose(smooth, np.mean(views, axis=0), atol=1e-6)
