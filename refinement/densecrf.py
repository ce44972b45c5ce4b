"""The dense CRF: class probabilities follow the edges of the image.

Fully connected pairwise terms with Gaussian kernels, mean-field inference on the permutohedral lattice
(Kraehenbuehl and Koltun, NeurIPS 2011). Published systems differ in kernels, iterations and in what
they feed in; each is a preset.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from refinement.lattice import Kernel

if TYPE_CHECKING:  # torch and numba are imported by the backends that need them
    import torch
    from torch import Tensor

IMAGE_MODES = ("raw", "bgr", "wrapped")
UNARY_TYPES = ("float16", "float32")

# Caffe's ImageNet means (B, G, R), which CLIP-ES and DeepLab-v2 subtract from the image that the CRF sees.
MEAN_BGR = np.array([104.008, 116.669, 122.675], np.float32)


@dataclass(frozen=True)
class Preset:
    """One published way to run the dense CRF.

    Attributes:
        iterations: of mean-field inference.
        gaussian_sxy, gaussian_compat: width in pixels and Potts weight of the smoothness kernel.
        bilateral_sxy, bilateral_srgb, bilateral_compat: width in pixels, width in grey levels and Potts
            weight of the appearance kernel.
        clip: the least probability; the energy is at most -log of it.
        unary_type: "float16" computes the energies in half precision, as CLIP-ES does; "float32" moves its
            posterior by up to 3e-2 and few labels.
        image_mode: "raw"; "bgr", the same in the other channel order, in which the lattice differs: on noisy
            images a label in a hundred; or "wrapped" (see `wrapped_bgr`), which gives the published numbers
            of CLIP-ES and DeepLab-v2.
    """

    iterations: int
    gaussian_sxy: float
    gaussian_compat: float
    bilateral_sxy: float
    bilateral_srgb: float
    bilateral_compat: float
    clip: float = 1e-5
    unary_type: str = "float32"
    image_mode: str = "raw"

    def __post_init__(self):
        if self.unary_type not in UNARY_TYPES:
            raise ValueError(f"CRF unary type must be {' or '.join(UNARY_TYPES)}, got {self.unary_type!r}")
        if self.image_mode not in IMAGE_MODES:
            raise ValueError(f"CRF image mode must be {' or '.join(IMAGE_MODES)}, got {self.image_mode!r}")
        if min(self.gaussian_sxy, self.bilateral_sxy, self.bilateral_srgb) <= 0:
            raise ValueError("CRF kernel widths must be above 0")
        if min(self.gaussian_compat, self.bilateral_compat, self.iterations) < 0:
            raise ValueError("CRF Potts weights and iterations must not be negative")

    def kernels(self) -> list[Kernel]:
        """The smoothness kernel, on positions, and the appearance kernel, on positions and colours."""
        place, colour = (self.bilateral_sxy,) * 2, (self.bilateral_srgb,) * 3
        return [
            Kernel((self.gaussian_sxy,) * 2, self.gaussian_compat),
            Kernel(place + colour, self.bilateral_compat),
        ]


PRESETS = {
    "clip_es": Preset(
        iterations=10,
        gaussian_sxy=1,
        gaussian_compat=3,
        bilateral_sxy=67,
        bilateral_srgb=3,
        bilateral_compat=4,
        unary_type="float16",
        image_mode="wrapped",
    ),
    # DeepLab-v2's (deeplab-pytorch), on the image as it is.
    "deeplab": Preset(
        iterations=10,
        gaussian_sxy=1,
        gaussian_compat=3,
        bilateral_sxy=67,
        bilateral_srgb=3,
        bilateral_compat=4,
        image_mode="bgr",
    ),
    # DeepLab-v1 on ResNet-38d, as SEAM's code base tests it.
    "seam": Preset(
        iterations=1,
        gaussian_sxy=3,
        gaussian_compat=3,
        bilateral_sxy=32,
        bilateral_srgb=13,
        bilateral_compat=10,
    ),
    # The same network as WeakCLIP's fork (deeplabv1-resnet38) tests it on VOC.
    "r38_voc": Preset(
        iterations=10,
        gaussian_sxy=1,
        gaussian_compat=3,
        bilateral_sxy=112,
        bilateral_srgb=2,
        bilateral_compat=3,
    ),
}
# What DeepLab-v2's published numbers were made with, and the fork's on COCO: the same, on another image.
PRESETS["deeplab_published"] = replace(PRESETS["deeplab"], image_mode="wrapped")
PRESETS["r38_coco"] = replace(PRESETS["deeplab"], image_mode="raw")


def densecrf(
    image: np.ndarray,
    probabilities: np.ndarray,
    preset: str | Preset = "clip_es",
    backend: str = "auto",
) -> np.ndarray:
    """Class posteriors of a dense CRF.

    Args:
        image: (H, W, 3) uint8 RGB.
        probabilities: (C, H, W) float, in [0, 1], not necessarily summing to 1; background included.
        preset: a name in `PRESETS`, or one of your own.
        backend: a name in `BACKENDS`, or "auto" for the fastest there is for where the arrays are.

    Returns:
        (C, H, W) float32, summing to 1 over C.

    Raises:
        ValueError: shapes that do not fit, an unknown preset or backend, a backend not installed, or kernels
            too narrow for the size of the image.
    """
    return densecrf_batch([image], [probabilities], preset, backend)[0]


def densecrf_batch(
    images: Sequence[np.ndarray | Tensor],
    probabilities: Sequence[np.ndarray | Tensor],
    preset: str | Preset = "clip_es",
    backend: str = "auto",
    device: str | torch.device | None = None,
) -> list[np.ndarray | Tensor]:
    """Class posteriors of several images, of any sizes and numbers of classes.

    Args:
        images: (H, W, 3) uint8 RGB each; arrays or tensors.
        probabilities: (C, H, W) float each, see `densecrf`.
        preset: see `densecrf`.
        backend: a name in `BACKENDS`; "auto" is torch on a GPU and numba on a CPU.
        device: where the torch backend computes, and where tensors are returned; None is where the first
            probabilities are.

    Returns:
        (C, H, W) float32 each: arrays for probabilities in arrays; tensors on `device` for tensors, which
        the torch backend never moves to the CPU.

    Raises:
        ValueError: see `densecrf`.
    """
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise ValueError(f"no CRF preset {preset!r}, there are {', '.join(PRESETS)}")
        preset = PRESETS[preset]
    if backend not in BACKENDS and backend != "auto":
        raise ValueError(f"no CRF backend {backend!r}, there are auto, {', '.join(BACKENDS)}")
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


def wrapped_bgr(image: np.ndarray) -> np.ndarray:
    """The CRF image of CLIP-ES and DeepLab-v2: less its means, cast to 8 bits, where what is negative wraps.

    Grey levels just below a channel's mean thus lie far from those just above it. The public cast is
    undefined in C and happens to be this on x86; here it is modulo 256 on any machine.

    Args:
        image: (H, W, 3) uint8 RGB.

    Returns:
        (H, W, 3) uint8 BGR, trunc(value - mean) modulo 256.
    """
    shifted = image[..., ::-1].astype(np.float32) - MEAN_BGR
    return (np.trunc(shifted).astype(np.int32) % 256).astype(np.uint8)


def seen(image: np.ndarray, preset: Preset) -> np.ndarray:
    """What the appearance kernel sees of an (H, W, 3) uint8 RGB image, of the same shape."""
    if preset.image_mode == "wrapped":
        image = wrapped_bgr(image)
    elif preset.image_mode == "bgr":
        image = image[..., ::-1]
    return np.ascontiguousarray(image)


def unary(probabilities: np.ndarray, preset: Preset) -> np.ndarray:
    """Energies -log p in the preset's type: (C, H, W) -> (C, H, W) float32."""
    dtype = np.dtype(preset.unary_type)
    clipped = np.clip(probabilities.astype(dtype), dtype.type(preset.clip), dtype.type(1))
    return -np.log(clipped).astype(np.float32)


def _one_by_one(infer: Callable[[np.ndarray, np.ndarray, Preset], np.ndarray]) -> Callable[..., list]:
    """A backend from a function of one image in arrays: guide (H, W, 3) uint8, energies (C, H, W)."""

    def backend(images, probabilities, preset, device):
        posteriors = []
        for image, classes in zip(images, probabilities, strict=True):
            array, rgb = (
                x if isinstance(x, np.ndarray) else x.detach().cpu().numpy() for x in (classes, image)
            )
            posterior = infer(seen(rgb, preset), unary(array, preset), preset)
            if array is not classes:
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
        raise ValueError("this dense CRF needs pydensecrf2: pip install pydensecrf2") from None
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
        raise ValueError("this dense CRF needs numba: pip install numba") from None
    except RuntimeError:  # numba's, when it finds no folder for its cache
        raise ValueError(
            "numba cannot keep its compiled code: set NUMBA_CACHE_DIR to a folder that can be written"
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

    def there(given: np.ndarray | Tensor) -> Tensor:
        if isinstance(given, np.ndarray):  # copied: a view may be read-only or run backwards
            return torch.tensor(np.ascontiguousarray(given), device=device)
        return given.to(device)

    posteriors = densecrf_torch.infer([*map(there, images)], [*map(there, probabilities)], preset)
    return [
        posterior.cpu().numpy() if isinstance(given, np.ndarray) else posterior
        for given, posterior in zip(probabilities, posteriors, strict=True)
    ]


# (images, probabilities, preset, device) -> posteriors, as `densecrf_batch` has them
BACKENDS = {"pydensecrf": _one_by_one(_pydensecrf), "numba": _one_by_one(_numba), "torch": _torch}
