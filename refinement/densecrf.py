"""The dense CRF: class probabilities refined along the edges of the image.

Fully connected pairwise terms with Gaussian kernels, mean-field inference on the permutohedral lattice
(Kraehenbuehl and Koltun, NeurIPS 2011). `refinement.presets` holds the published settings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from refinement.presets import IMAGE_MODES, PRESETS, UNARY_TYPES, Preset, guide_image, unary

if TYPE_CHECKING:  # torch and numba are imported by the backends that need them
    import torch
    from torch import Tensor

__all__ = ["BACKENDS", "IMAGE_MODES", "PRESETS", "UNARY_TYPES", "Preset", "densecrf", "densecrf_batch"]


def densecrf(
    image: np.ndarray,
    probabilities: np.ndarray,
    preset: str | Preset = "clip_es",
    backend: str = "auto",
) -> np.ndarray:
    """Return the class posteriors of a dense CRF.

    Args:
        image: (H, W, 3) uint8 RGB.
        probabilities: (C, H, W) float, in [0, 1], not necessarily summing to 1; background included.
        preset: a name in `PRESETS`, or a `Preset`.
        backend: a name in `BACKENDS`, or "auto" for the fastest one on the device of the arrays.

    Returns:
        (C, H, W) float32, summing to 1 over C.

    Raises:
        ValueError: shapes that do not fit, an unknown preset or backend, a backend that is not installed, or
            kernels too narrow for the size of the image.
    """
    return densecrf_batch([image], [probabilities], preset, backend)[0]


def densecrf_batch(
    images: Sequence[np.ndarray | Tensor],
    probabilities: Sequence[np.ndarray | Tensor],
    preset: str | Preset = "clip_es",
    backend: str = "auto",
    device: str | torch.device | None = None,
) -> list[np.ndarray | Tensor]:
    """Return the class posteriors of several images of any sizes and numbers of classes.

    Args:
        images: (H, W, 3) uint8 RGB each; arrays or tensors.
        probabilities: (C, H, W) float each, see `densecrf`.
        preset: see `densecrf`.
        backend: a name in `BACKENDS`; "auto" is torch on a GPU and numba on a CPU.
        device: where the torch backend computes, and where tensors are returned; None is the device of the
            first probabilities.

    Returns:
        (C, H, W) float32 each: arrays for probabilities in arrays; tensors on `device` for tensors, which
        the torch backend never moves to the CPU.

    Raises:
        ValueError: see `densecrf`.
    """
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise ValueError(f"no CRF preset {preset!r}, choose from {', '.join(PRESETS)}")
        preset = PRESETS[preset]
    if backend not in BACKENDS and backend != "auto":
        raise ValueError(f"no CRF backend {backend!r}, choose from auto, {', '.join(BACKENDS)}")
    if len(images) != len(probabilities):
        raise ValueError(f"the CRF got {len(images)} images but {len(probabilities)} arrays of probabilities")
    for image, classes in zip(images, probabilities, strict=True):
        if str(image.dtype).removeprefix("torch.") != "uint8" or image.ndim != 3 or image.shape[2] != 3:
            shape = tuple(image.shape)
            raise ValueError(f"the CRF needs an (H, W, 3) uint8 image, got {shape} {image.dtype}")
        size, shape = tuple(image.shape[:2]), tuple(classes.shape)
        if len(shape) != 3 or shape[1:] != size:
            raise ValueError(f"class probabilities are {shape[1:]} but the image is {size} (H, W)")
        if 0 in shape:
            raise ValueError(f"the CRF needs classes and pixels, got probabilities of shape {shape}")
    if not images:
        return []
    if device is None:
        device = "cpu" if isinstance(probabilities[0], np.ndarray) else probabilities[0].device
    if backend == "auto":
        backend = "numba" if str(device) == "cpu" else "torch"
    return BACKENDS[backend](images, probabilities, preset, device)


def _per_image(infer: Callable[[np.ndarray, np.ndarray, Preset], np.ndarray]) -> Callable[..., list]:
    """Return a backend from a function of one guide image (H, W, 3) uint8 and energies (C, H, W)."""

    def as_array(values: np.ndarray | Tensor) -> np.ndarray:
        return values if isinstance(values, np.ndarray) else values.detach().cpu().numpy()

    def backend(images, probabilities, preset, device):
        posteriors = []
        for image, classes in zip(images, probabilities, strict=True):
            energies = unary(as_array(classes), preset)
            posterior = infer(guide_image(as_array(image), preset), energies, preset)
            if not isinstance(classes, np.ndarray):
                import torch

                posterior = torch.from_numpy(posterior).to(device)
            posteriors.append(posterior)
        return posteriors

    return backend


def _pydensecrf(image: np.ndarray, energies: np.ndarray, preset: Preset) -> np.ndarray:
    """The reference: Kraehenbuehl's own code, wrapped."""
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
    """The same on one core, about twice as fast; see `refinement.densecrf_numba`."""
    try:
        from refinement import densecrf_numba
    except ImportError:
        raise ValueError("the CRF backend numba is not installed: pip install numba") from None
    except RuntimeError:  # numba found no folder for its cache
        raise ValueError(
            "numba cannot store its compiled code: set NUMBA_CACHE_DIR to a writable folder"
        ) from None
    return densecrf_numba.infer(image, energies, preset.kernels(), preset.iterations)


def _torch(
    images: Sequence[np.ndarray | Tensor],
    probabilities: Sequence[np.ndarray | Tensor],
    preset: Preset,
    device: str | torch.device,
) -> list[np.ndarray | Tensor]:
    """The same for many images at once on a device; see `refinement.densecrf_torch`."""
    import torch

    from refinement import densecrf_torch

    def on_device(values: np.ndarray | Tensor) -> Tensor:
        if isinstance(values, np.ndarray):  # copied: a view may be read-only or have negative strides
            return torch.tensor(np.ascontiguousarray(values), device=device)
        return values.to(device)

    posteriors = densecrf_torch.infer([*map(on_device, images)], [*map(on_device, probabilities)], preset)
    return [
        posterior.cpu().numpy() if isinstance(classes, np.ndarray) else posterior
        for classes, posterior in zip(probabilities, posteriors, strict=True)
    ]


# (images, probabilities, preset, device) -> posteriors, as in `densecrf_batch`
BACKENDS = {"pydensecrf": _per_image(_pydensecrf), "numba": _per_image(_numba), "torch": _torch}
