"""The dense CRF: refine class probabilities so that they follow the edges of the image.

The pairwise terms are fully connected with Gaussian kernels. Mean-field inference runs on the permutohedral
lattice (Kraehenbuehl and Koltun, NeurIPS 2011).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from refinement.presets import IMAGE_MODES, PRESETS, UNARY_TYPES, Preset, guide_image, unary

if TYPE_CHECKING:  # at run time, only the backends import torch and numba, when they are used
    import torch
    from torch import Tensor

# Allowed below 0 and above 1, where values are clipped: bfloat16 rounds probabilities by up to 0.004.
TOLERANCE = 0.01

__all__ = ["BACKENDS", "IMAGE_MODES", "PRESETS", "UNARY_TYPES", "Preset", "densecrf", "densecrf_batch"]


def densecrf(
    image: np.ndarray,
    probabilities: np.ndarray,
    preset: str | Preset = "clip_es",
    backend: str = "auto",
) -> np.ndarray:
    """Return the class posteriors of a dense CRF, (C, H, W) float32, summing to 1 over C.

    Args:
        image: (H, W, 3) uint8 RGB.
        probabilities: (C, H, W) in [0, 1], including background; the sum over C need not be 1. Number types
            other than float16 and float32 are converted to float32.
        preset: a name in `PRESETS`, or a `Preset`.
        backend: a name in `BACKENDS`, or "auto": torch on a GPU, numba on a CPU.

    Raises:
        ValueError: shapes do not match, probabilities are not numbers, not finite or outside [0, 1], the
            preset or backend is unknown, the backend is not installed, kernels are too narrow for the image
            size, or the posterior is not finite.
    """
    return densecrf_batch([image], [probabilities], preset, backend)[0]


def densecrf_batch(
    images: Sequence[np.ndarray | Tensor],
    probabilities: Sequence[np.ndarray | Tensor],
    preset: str | Preset = "clip_es",
    backend: str = "auto",
    device: str | torch.device | None = None,
) -> list[np.ndarray | Tensor]:
    """Return the class posteriors of several images, see `densecrf`; sizes and numbers of classes may differ.

    Args:
        images, probabilities: arrays or tensors; one of each per image.
        preset, backend: see `densecrf`.
        device: device of the torch backend and of returned tensors; None uses the device of the first
            probabilities.

    Returns:
        (C, H, W) float32 for each image: an array if its probabilities are an array, else a tensor on
        `device`. The torch backend does not move tensors to the CPU.
    """
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise ValueError(f"no CRF preset {preset!r}: choose one of {', '.join(PRESETS)}")
        preset = PRESETS[preset]
    if backend not in BACKENDS and backend != "auto":
        raise ValueError(f"no CRF backend {backend!r}: choose one of auto, {', '.join(BACKENDS)}")
    if len(images) != len(probabilities):
        raise ValueError(f"{len(images)} images but {len(probabilities)} arrays of probabilities for the CRF")
    for array in (*images, *probabilities):
        if not hasattr(array, "dtype"):
            raise ValueError(f"the CRF requires arrays or tensors, got a {type(array).__name__}")
    for image, classes in zip(images, probabilities, strict=True):
        if str(image.dtype).removeprefix("torch.") != "uint8" or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(
                f"the CRF requires an (H, W, 3) uint8 image, got {tuple(image.shape)} {image.dtype}"
            )
        size, shape = tuple(image.shape[:2]), tuple(classes.shape)
        if len(shape) != 3 or shape[1:] != size:
            raise ValueError(f"class probabilities are {shape[1:]} but the image is {size} (H, W)")
        if 0 in shape:
            raise ValueError(f"the CRF requires at least one class and pixel, got shape {shape} (C, H, W)")
    if not images:
        return []
    probabilities = [_as_float(classes) for classes in probabilities]
    if device is None:
        device = "cpu" if isinstance(probabilities[0], np.ndarray) else probabilities[0].device
    if backend == "auto":
        backend = "numba" if str(device) == "cpu" else "torch"
    return BACKENDS[backend](images, probabilities, preset, device)


def _as_float(probabilities: np.ndarray | Tensor) -> np.ndarray | Tensor:
    """Return probabilities in float16 or float32 of this machine's byte order, without gradient.

    Other types are converted to float32, so that all backends compute with the same numbers.
    """
    dtype = str(probabilities.dtype).removeprefix("torch.")
    if isinstance(probabilities, np.ndarray):
        if probabilities.dtype.kind not in "biuf":
            raise ValueError(f"class probabilities must be numbers, got {dtype}: convert them to float32")
        with np.errstate(over="ignore"):  # the backends raise ValueError for infinity
            half = probabilities.dtype.kind == "f" and probabilities.dtype.itemsize == 2
            return probabilities.astype(np.float16 if half else np.float32, copy=False)
    if probabilities.is_complex() or probabilities.is_quantized or probabilities.is_sparse:
        raise ValueError("class probabilities must be dense real numbers: convert the tensor to float32")
    return probabilities.detach() if dtype in ("float16", "float32") else probabilities.detach().float()


def _check_range(low: float, high: float) -> None:
    """Raise ValueError if the smallest and largest of some probabilities are invalid."""
    if not math.isfinite(low) or not math.isfinite(high):
        raise ValueError("class probabilities have NaN or infinity: give undamaged CAMs or network outputs")
    if low < -TOLERANCE or high > 1 + TOLERANCE:
        raise ValueError(
            f"class probabilities must be in 0..1, got {low:g}..{high:g}: apply a softmax to logits, or "
            "divide by the largest possible value"
        )


def _require_finite(finite: bool) -> None:
    if not finite:
        raise ValueError(
            "the posterior of the CRF is not finite: give a preset with a larger clip (1e-5 is common) or "
            "smaller gaussian_compat and bilateral_compat"
        )


def _per_image(
    infer: Callable[[np.ndarray, np.ndarray, Preset], np.ndarray], images, probabilities, preset, device
) -> list[np.ndarray | Tensor]:
    """Run a backend for single images on several images.

    Args:
        infer: (guide image (H, W, 3) uint8, energies (C, H, W) float32, preset) -> posterior (C, H, W).
        images, probabilities, preset, device: see `densecrf_batch`.
    """
    posteriors = []
    for pair in zip(images, probabilities, strict=True):
        image, classes = (x if isinstance(x, np.ndarray) else x.detach().cpu().numpy() for x in pair)
        values = classes.astype(np.float32, copy=False)  # the minimum of float16 takes three times as long
        _check_range(float(values.min()), float(values.max()))
        posterior = infer(guide_image(image, preset), unary(classes, preset), preset)
        _require_finite(np.isfinite(posterior).all())
        if not isinstance(pair[1], np.ndarray):
            import torch

            posterior = torch.from_numpy(posterior).to(device)
        posteriors.append(posterior)
    return posteriors


def _pydensecrf(image: np.ndarray, energies: np.ndarray, preset: Preset) -> np.ndarray:
    """Run pydensecrf, Kraehenbuehl's reference implementation."""
    try:
        from pydensecrf.densecrf import DenseCRF2D
    except ImportError:
        raise ValueError(
            "the CRF backend pydensecrf is not installed: pip install pydensecrf2 (needs a C++ compiler), or "
            "use the backend numba"
        ) from None
    channels, height, width = energies.shape
    crf = DenseCRF2D(width, height, channels)
    crf.setUnaryEnergy(np.ascontiguousarray(energies.reshape(channels, -1)))  # (C, H * W)
    crf.addPairwiseGaussian(sxy=preset.gaussian_sxy, compat=preset.gaussian_compat)
    crf.addPairwiseBilateral(
        sxy=preset.bilateral_sxy, srgb=preset.bilateral_srgb, rgbim=image, compat=preset.bilateral_compat
    )
    posterior = crf.inference(preset.iterations)
    return np.array(posterior, np.float32).reshape(channels, height, width)


def _numba(image: np.ndarray, energies: np.ndarray, preset: Preset) -> np.ndarray:
    """Run `refinement.densecrf_numba`: one CPU core, about twice as fast as the reference implementation."""
    try:
        from refinement import densecrf_numba
    except ImportError:
        raise ValueError("the CRF backend numba is not installed: pip install numba") from None
    except RuntimeError:  # raised by numba if it has no writable folder for its cache
        raise ValueError(
            "numba cannot store its compiled code: set NUMBA_CACHE_DIR to a writable folder"
        ) from None
    return densecrf_numba.infer(image, energies, preset.kernels(), preset.iterations)


def _torch(images, probabilities, preset, device) -> list[np.ndarray | Tensor]:
    """Run `refinement.densecrf_torch`: many images at once, on a GPU or CPU."""
    import torch

    from refinement import densecrf_torch

    def on_device(values: np.ndarray | Tensor) -> Tensor:
        # torch does not accept views with negative strides and warns of read-only arrays: copy them.
        return torch.as_tensor(values.copy() if isinstance(values, np.ndarray) else values, device=device)

    classes = [*map(on_device, probabilities)]
    ranges = torch.stack([torch.stack(values.float().aminmax()) for values in classes])  # (B, 2)
    for low, high in ranges.tolist():
        _check_range(low, high)
    posteriors = densecrf_torch.infer([*map(on_device, images)], classes, preset)
    _require_finite(torch.stack([posterior.isfinite().all() for posterior in posteriors]).all())
    return [
        posterior.cpu().numpy() if isinstance(classes, np.ndarray) else posterior
        for classes, posterior in zip(probabilities, posteriors, strict=True)
    ]


# (images, probabilities, preset, device) -> posteriors, as in `densecrf_batch`
BACKENDS = {
    "pydensecrf": partial(_per_image, _pydensecrf),
    "numba": partial(_per_image, _numba),
    "torch": _torch,
}
