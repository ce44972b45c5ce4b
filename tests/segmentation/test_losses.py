"""Losses: against golden vectors, split over processes, and without labeled pixels."""

import numpy as np
import pytest
import torch

from segmentation.losses import LOSSES, balanced_cross_entropy, cross_entropy, pyramid
from tests.deeplab.common import golden
from tests.weights import parity_array

SIZES = (9, 5, 7, 9)


def logits(index, size):
    drawn = parity_array(f"dl:logit{index}", (2, 5, size, size), scale=3.0)
    return torch.from_numpy(drawn).requires_grad_()


@pytest.fixture(scope="module")
def label_65():
    return torch.from_numpy(golden("a_labels")["label_65"]).long()


@pytest.mark.parametrize("loss, prefix", [("ce", ""), ("balanced", "balanced_")])
def test_losses_and_gradients_match_golden(loss, prefix, label_65):
    arrays = golden("a_loss")
    outputs = [logits(index, size) for index, size in enumerate(SIZES)]
    losses = pyramid(outputs, label_65, LOSSES[loss])
    values = [value.item() for value in losses]
    np.testing.assert_allclose(values, arrays[f"{prefix}per_output"], rtol=1e-5)
    total = sum(losses) / 2
    np.testing.assert_allclose(total.item(), arrays[f"{prefix}total_iter_size2"], rtol=1e-5)
    total.backward()
    for index, output in enumerate(outputs):
        expected = arrays[f"{prefix}grad{index}"]
        np.testing.assert_allclose(output.grad, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("loss", LOSSES.values())
def test_loss_without_labeled_pixels_and_its_gradient_are_0(loss):
    output = logits(0, 9)
    value = loss(output, torch.full((2, 9, 9), 255))
    value.backward()
    assert value.item() == 0
    assert (output.grad == 0).all()


def test_balanced_loss_counts_an_empty_part_as_0():
    expected = float(golden("a_loss")["no_background_ce"])
    labels = torch.full((2, 9, 9), 255)
    labels[0, :4] = 1
    output = logits(0, 9)
    np.testing.assert_allclose(cross_entropy(output, labels).item(), expected, rtol=1e-5)
    np.testing.assert_allclose(balanced_cross_entropy(output, labels).item(), expected / 2, rtol=1e-5)
    background = labels.where(labels == 255, 0)
    plain = cross_entropy(output, background).item()
    np.testing.assert_allclose(balanced_cross_entropy(output, background).item(), plain / 2, rtol=1e-5)


def gradient(loss, output, labels, global_count=None):
    """Gradient of the summed losses of `output` (B, C, h, w) and of `output` at half size."""
    output = output.clone().requires_grad_()
    sum(pyramid([output, output[..., ::2, ::2]], labels, loss, global_count)).backward()
    return output.grad


@pytest.mark.parametrize("loss", LOSSES.values())
def test_global_count_gives_the_gradient_of_the_whole_batch(loss):
    random = np.random.default_rng(3)
    output = torch.from_numpy(random.standard_normal((4, 5, 8, 8)))
    labels = torch.from_numpy(random.integers(0, 5, (4, 8, 8)))
    labels[2:][torch.from_numpy(random.random((2, 8, 8)) < 0.9)] = 255  # the second half is mostly ignored
    halves = [(output[:2], labels[:2]), (output[2:], labels[2:])]

    counts = []  # pixel counts of each half, in the order of the calls
    for half in halves:
        counts.append([])
        gradient(loss, *half, lambda local, seen=counts[-1]: seen.append(local) or local)
    means = [(first + second) / 2 for first, second in zip(*counts, strict=True)]

    def mean_over_halves(use_global_count):
        """The mean of the gradients of two processes."""
        gradients = []
        for half in halves:
            counts = iter(means)
            global_count = (lambda local, counts=counts: next(counts)) if use_global_count else None
            gradients.append(gradient(loss, *half, global_count))
        return torch.cat(gradients) / 2

    whole = gradient(loss, output, labels)
    assert (mean_over_halves(True) - whole).abs().max() < 1e-12
    assert (mean_over_halves(False) - whole).abs().max() > 1e-3  # without global counts it is wrong


@pytest.mark.parametrize("loss", LOSSES.values())
def test_process_without_labeled_pixels_has_loss_0(loss):
    output = logits(0, 9)
    value = loss(output, torch.full((2, 9, 9), 255), lambda local: local + 7)
    value.backward()
    assert value.item() == 0
    assert (output.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_give_a_float32_loss(dtype, label_65):
    half = torch.from_numpy(parity_array("dl:half", (2, 5, 65, 65))).to(dtype)
    value = cross_entropy(half, label_65)
    assert value.dtype == torch.float32
    np.testing.assert_allclose(value.item(), cross_entropy(half.double(), label_65).item(), rtol=1e-6)


def test_pyramid_accepts_a_single_output(label_65):
    output = torch.from_numpy(parity_array("dl:one", (2, 5, 65, 65)))
    (value,) = pyramid(output, label_65, cross_entropy)
    expected = torch.nn.functional.cross_entropy(output, label_65, ignore_index=255)
    np.testing.assert_allclose(value.item(), expected.item(), rtol=1e-6)
