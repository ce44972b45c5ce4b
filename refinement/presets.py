"""Presets of the dense CRF, and what it reads: kernels, energies and the image of the appearance kernel.

Published systems differ in kernels, iterations and inputs. A preset holds all of it. Every backend reads
this module; `refinement.densecrf` holds the public functions.
"""

from dataclasses import dataclass, replace

import numpy as np

from refinement.lattice import Kernel

IMAGE_MODES = ("raw", "bgr", "wrapped")
UNARY_TYPES = ("float16", "float32")

# Caffe's ImageNet means (B, G, R). CLIP-ES and DeepLab-v2 subtract them from the image of the CRF.
MEAN_BGR = np.array([104.008, 116.669, 122.675], np.float32)


@dataclass(frozen=True)
class Preset:
    """One published way to run the dense CRF.

    Attributes:
        iterations: mean-field iterations.
        gaussian_sxy, gaussian_compat: width in pixels and Potts weight of the smoothness kernel.
        bilateral_sxy, bilateral_srgb, bilateral_compat: width in pixels, width in gray levels and Potts
            weight of the appearance kernel.
        clip: lower bound of the probabilities; the energy is at most -log(clip).
        unary_type: "float16" computes the energies in half precision, as CLIP-ES does. "float32" changes the
            posterior by up to 3e-2 and few labels.
        image_mode: "raw" is RGB. "bgr" has the other channel order, which changes the lattice: 1 % of the
            labels on noisy images. "wrapped" (see `wrapped_bgr`) gives the published numbers of CLIP-ES and
            DeepLab-v2.

    Raises:
        ValueError: an unknown type or mode, or a number out of range.
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
        """The smoothness kernel, on positions, and the appearance kernel, on positions and colors."""
        position, color = (self.bilateral_sxy,) * 2, (self.bilateral_srgb,) * 3
        return [
            Kernel((self.gaussian_sxy,) * 2, self.gaussian_compat),
            Kernel(position + color, self.bilateral_compat),
        ]


DEEPLAB = Preset(
    iterations=10,
    gaussian_sxy=1,
    gaussian_compat=3,
    bilateral_sxy=67,
    bilateral_srgb=3,
    bilateral_compat=4,
)
PRESETS = {
    "clip_es": replace(DEEPLAB, unary_type="float16", image_mode="wrapped"),
    # DeepLab-v2 (deeplab-pytorch) on the plain image, and as its published numbers were computed.
    "deeplab": replace(DEEPLAB, image_mode="bgr"),
    "deeplab_published": replace(DEEPLAB, image_mode="wrapped"),
    # DeepLab-v1 on ResNet-38d, as SEAM's code base tests it.
    "seam": Preset(
        iterations=1,
        gaussian_sxy=3,
        gaussian_compat=3,
        bilateral_sxy=32,
        bilateral_srgb=13,
        bilateral_compat=10,
    ),
    # The same network as WeakCLIP's fork (deeplabv1-resnet38) tests it on VOC, and on COCO.
    "r38_voc": Preset(
        iterations=10,
        gaussian_sxy=1,
        gaussian_compat=3,
        bilateral_sxy=112,
        bilateral_srgb=2,
        bilateral_compat=3,
    ),
    "r38_coco": DEEPLAB,
}


def wrapped_bgr(image: np.ndarray) -> np.ndarray:
    """Return the CRF image of CLIP-ES and DeepLab-v2: mean-subtracted, cast to 8 bits, negatives wrapped.

    Gray levels just below a channel's mean become distant from those just above it. The cast of the reference
    implementations is undefined in C and wraps on x86; here it is modulo 256 on every machine.

    Args:
        image: (H, W, 3) uint8 RGB.

    Returns:
        (H, W, 3) uint8 BGR, trunc(value - mean) modulo 256.
    """
    shifted = image[..., ::-1].astype(np.float32) - MEAN_BGR
    return (np.trunc(shifted).astype(np.int32) % 256).astype(np.uint8)


def guide_image(image: np.ndarray, preset: Preset) -> np.ndarray:
    """Return the image of the appearance kernel: (H, W, 3) uint8 RGB -> the same shape, see `image_mode`."""
    if preset.image_mode == "wrapped":
        image = wrapped_bgr(image)
    elif preset.image_mode == "bgr":
        image = image[..., ::-1]
    return np.ascontiguousarray(image)


def unary(probabilities: np.ndarray, preset: Preset) -> np.ndarray:
    """Return the energies -log p in the preset's type: (C, H, W) -> (C, H, W) float32."""
    dtype = np.dtype(preset.unary_type)
    clipped = np.clip(probabilities.astype(dtype), dtype.type(preset.clip), dtype.type(1))
    return -np.log(clipped).astype(np.float32)
