"""Multi-scale and flip inference: the published tests, and each option of a protocol."""
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deeplab.resnet38 import build_r38
from segmentation.inference import Protocol, rescale
from segmentation.inference import infer as segment
from segmentation.transforms import imagenet_normalize
from tests.deeplab.common import golden, input_b
from tests.weights import fill_module, parity_array, parity_image

SEAM = Protocol((0.5, 0.75, 1.0, 1.25, 1.5, 1.75), True, "logits", align_corners=True, resize="cubic")


class Small(nn.Module):
    """Network with four classes, stride 8 and an asymmetric filter; records the shapes of its inputs."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 9, stride=8, padding=4)
        fill_module(self)
        self.input_shapes = []
        self.eval()

    def forward(self, batch):
        self.input_shapes.append(tuple(batch.shape))
        return 20 * self.layer(batch)


class Constant(nn.Module):
    """Network that returns the same logits for every image."""

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.logits = logits
        self.eval()

    def forward(self, batch):
        return self.logits


def infer(*arguments, **options) -> torch.Tensor:
    return segment(*arguments, **options).probabilities


def image(name: str, height: int, width: int) -> np.ndarray:
    return imagenet_normalize(parity_image(name, height, width))


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_scales_and_flips_are_averaged(average, align_corners):
    model, pixels = Small(), image("protocol", 41, 58)
    found = infer(model, pixels, Protocol((0.5, 1.0, 1.5), True, average, align_corners))
    views = []
    for scale in (0.5, 1.0, 1.5):
        batch = torch.from_numpy(rescale(pixels, scale))[None]
        for mirrored in (False, True):
            logits = model(batch.flip(3) if mirrored else batch)
            full = F.interpolate(logits, (41, 58), mode="bilinear", align_corners=align_corners)
            full = full.flip(3) if mirrored else full
            views.append(full.softmax(1) if average == "probabilities" else full)
    mean = torch.cat(views).mean(0)
    expected = mean if average == "probabilities" else mean.softmax(0)
    torch.testing.assert_close(found, expected.detach(), atol=1e-5, rtol=0)
    assert found.shape == (4, 41, 58)


@pytest.mark.parametrize("scale", [0.5, 0.75, 1.25, 1.5])
def test_rescale_computes_source_positions_from_the_factor(scale):
    """F.interpolate with scale_factor does the same; it rounds sizes down."""
    pixels = image("factor", 41, 58)
    found = rescale(pixels, scale)
    assert found.shape[1:] == (round(41 * scale), round(58 * scale))
    expected = F.interpolate(torch.from_numpy(pixels)[None], scale_factor=scale, mode="bilinear")[0].numpy()
    height, width = expected.shape[1:]
    np.testing.assert_allclose(found[:, :height, :width], expected, atol=1e-4)


def test_image_and_mirrored_image_are_one_batch():
    model = Small()
    infer(model, image("batch", 20, 30), Protocol((1.0, 2.0), flip=True))
    infer(model, image("batch", 20, 30), Protocol())
    assert model.input_shapes == [(2, 3, 20, 30), (2, 3, 40, 60), (1, 3, 20, 30)]


def test_mirrored_image_gives_mirrored_probabilities():
    pixels = image("mirror", 32, 48)  # 1.5 times each side is whole; otherwise `rescale` is not symmetric
    found = infer(Small(), pixels, Protocol((1.0, 1.5), flip=True))
    mirrored = infer(Small(), pixels[..., ::-1].copy(), Protocol((1.0, 1.5), flip=True))
    torch.testing.assert_close(found, mirrored.flip(-1), atol=1e-5, rtol=0)


def test_default_protocol_resizes_the_logits_to_image_size():
    model, pixels = Small(), image("plain", 25, 39)
    probabilities, logits = segment(model, pixels, Protocol())
    assert logits.shape == (4, 4, 5)
    expected = F.interpolate(logits[None], (25, 39), mode="bilinear", align_corners=False).softmax(1)[0]
    torch.testing.assert_close(probabilities, expected, atol=1e-6, rtol=0)
    multi_scale = segment(model, pixels, Protocol((0.5, 1.0, 2.0), flip=True)).logits
    torch.testing.assert_close(multi_scale, logits, atol=1e-5, rtol=0)
    assert segment(model, pixels, Protocol((0.5,))).logits is None


def test_averages_of_probabilities_and_logits_differ():
    pixels = image("averages", 33, 47)
    one, two = (infer(Small(), pixels, Protocol((0.5, 1.0), average=a)) for a in ("probabilities", "logits"))
    assert (one - two).abs().max() > 1e-3


def test_half_precision_is_close_and_returns_float32():
    model, pixels = Small(), image("half", 33, 47)
    full, half = infer(model, pixels, Protocol()), infer(model, pixels, Protocol(), precision="bf16")
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.sum(0), torch.ones(33, 47))
    assert 0 < (full - half).abs().max() < 0.2


def test_memory_format_does_not_change_the_result():
    model, pixels = Small(), image("format", 33, 47)
    expected = infer(model, pixels, SEAM)
    found = infer(model.to(memory_format=torch.channels_last), pixels, SEAM)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": ()}, "above 0"),
        ({"scales": (1.0, 0.0)}, "above 0"),
        ({"scales": (float("nan"),)}, "above 0"),
        ({"average": "votes"}, "probabilities, logits"),
        ({"resize": "nearest"}, "linear, cubic"),
    ],
)
def test_invalid_protocol_raises(options, message):
    with pytest.raises(ValueError, match=message):
        Protocol(**options)


def test_invalid_arguments_of_infer_raise():
    with pytest.raises(ValueError, match="eval"):
        infer(Small().train(), image("misuse", 9, 9), Protocol())
    with pytest.raises(ValueError, match="fp32, tf32, bf16, fp16"):
        infer(Small(), image("misuse", 9, 9), Protocol(), precision="int8")
    with pytest.raises(ValueError, match=r"too small for scale 0.5"):
        infer(Small(), image("misuse", 1, 9), Protocol((0.5,)))


@pytest.mark.parametrize(("index", "size"), [(0, (40, 56)), (1, (49, 33))])
def test_rescale_matches_golden(index, size):
    expected = golden("b_test")
    prefix = "{}x{}_".format(*size)
    normalized = input_b(f"r38:ms{index}", *size)[0].numpy()
    np.testing.assert_allclose(
        rescale(normalized, 0.75, "cubic")[:, :6, :6], expected[prefix + "image_0.75_corner"], atol=1e-5
    )
    sizes = [rescale(normalized, scale, "cubic").shape[1:] for scale in SEAM.scales for _ in range(2)]
    np.testing.assert_array_equal(sizes, expected[prefix + "sizes"])


def test_probabilities_of_default_protocol_match_golden():
    """The network returns the stored logits of DeepLab-v2."""
    expected = golden("a_crf")
    for name, size, classes in [("sq", (48, 48), 5), ("wide", (37, 61), 21)]:
        small = [-(-side // 8) for side in size]
        logits = torch.from_numpy(parity_array(f"dl:crfl_{name}", (1, classes, *small), scale=2.0))
        found = infer(Constant(logits), np.zeros((3, *size), np.float32), Protocol())
        np.testing.assert_allclose(found[:, ::4, ::4], expected[f"{name}_prob"], atol=1e-6)


@pytest.mark.parametrize(("index", "size"), [(0, (40, 56)), (1, (49, 33))])
def test_seam_protocol_matches_golden(index, size):
    """A small DeepLab-v1 at six scales with flip. The reference implementation runs the flip separately."""
    expected, prefix = golden("b_test"), "{}x{}_".format(*size)
    model = fill_module(build_r38(5, width=4)).eval()
    probabilities = infer(model, input_b(f"r38:ms{index}", *size)[0].numpy(), SEAM)
    logits = expected[prefix + "mean_logits"]
    found = probabilities.log() - probabilities.log().mean(0)  # the logits, up to a constant
    np.testing.assert_allclose(found, logits - logits.mean(0), atol=1e-4 * np.abs(logits).max())
    assert (probabilities.argmax(0).numpy() == expected[prefix + "label"]).all()


@pytest.mark.parametrize("average", ["probabilities", "logits"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_output_that_is_not_finite_raises(average, value):
    logits = torch.zeros(1, 3, 4, 4)
    logits[0, 1, 2, 2] = value
    with pytest.raises(ValueError, match="the network's output is not finite"):
        segment(Constant(logits), np.zeros((3, 8, 8), np.float32), Protocol(average=average))
