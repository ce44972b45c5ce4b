"""Presets of the dense CRF, and its inputs: kernels, energies and the image of the appearance kernel.

Published systems differ in kernels, iterations and inputs. A preset contains all these settings; all backends
use it.
"""

from dataclasses import dataclass

import numpy as np

from foundation.settings import Settings, setting
from refinement.lattice import Kernel

IMAGE_MODES = ("raw", "bgr", "wrapped")
UNARY_TYPES = ("float16", "float32")

# Caffe's ImageNet means (B, G, R), which CLIP-ES and DeepLab-v2 subtract from the CRF's image.
MEAN_BGR = np.array([104.008, 116.669, 122.675], np.float32)


@dataclass(frozen=True)
class Preset(Settings):
    """Settings of the dense CRF in a published system. The defaults are the values of most systems."""

    iterations: int = setting(10, "mean-field iterations", least=0)
    gaussian_sxy: float = setting(1, "width of the smoothness kernel in pixels", above=0)
    gaussian_compat: float = setting(3, "Potts weight of the smoothness kernel", least=0)
    bilateral_sxy: float = setting(67, "width of the appearance kernel in pixels", above=0)
    bilateral_srgb: float = setting(3, "width of the appearance kernel in gray levels", above=0)
    bilateral_compat: float = setting(4, "Potts weight of the appearance kernel", least=0)
    clip: float = setting(1e-5, "lower bound of the probabilities: energies are at most -log(clip)", above=0)
    unary_type: str = setting(
        "float32",
        "data type in which energies are computed; float32 instead of CLIP-ES's float16 changes the "
        "posterior by up to 3e-2, and changes few labels",
        choices=UNARY_TYPES,
    )
    image_mode: str = setting(
        "raw",
        "image of the appearance kernel: raw is RGB; bgr gives a different lattice, which changes 1 % of the "
        "labels on noisy images; wrapped (see `wrapped_bgr`) gives the published numbers of CLIP-ES and "
        "DeepLab-v2",
        choices=IMAGE_MODES,
    )

    def kernels(self) -> list[Kernel]:
        """Return the smoothness kernel (positions) and the appearance kernel (positions and colors)."""
        position, color = (self.bilateral_sxy,) * 2, (self.bilateral_srgb,) * 3
        smoothness = Kernel((self.gaussian_sxy,) * 2, self.gaussian_compat)
        return [smoothness, Kernel(position + color, self.bilateral_compat)]


PRESETS = {
    "clip_es": Preset(unary_type="float16", image_mode="wrapped"),
    # DeepLab-v2 (deeplab-pytorch): on the unchanged image, then as in its published results.
    "deeplab": Preset(image_mode="bgr"),
    "deeplab_published": Preset(image_mode="wrapped"),
    # DeepLab-v1 on ResNet-38d, as in SEAM's test script.
    "seam": Preset(iterations=1, gaussian_sxy=3, bilateral_sxy=32, bilateral_srgb=13, bilateral_compat=10),
    # The same network, as in the test of WeakCLIP's fork (deeplabv1-resnet38), for VOC and for COCO.
    "r38_voc": Preset(bilateral_sxy=112, bilateral_srgb=2, bilateral_compat=3),
    "r38_coco": Preset(),
}


def wrapped_bgr(image: np.ndarray) -> np.ndarray:
    """Return trunc(BGR - mean) modulo 256, (H, W, 3) uint8, of an RGB image (H, W, 3) uint8.

    This is the CRF image of CLIP-ES and DeepLab-v2. Values just below a channel's mean wrap around, so they
    become very different from values just above it. The cast to 8 bits in the reference implementations is
    undefined in C and wraps on x86; here it wraps on all machines.
    """
    shifted = image[..., ::-1].astype(np.float32) - MEAN_BGR
    return (np.trunc(shifted).astype(np.int32) % 256).astype(np.uint8)


def guide_image(image: np.ndarray, preset: Preset) -> np.ndarray:
    """Return the image of the appearance kernel, (H, W, 3) uint8, made from an RGB image (H, W, 3) uint8."""
    if preset.image_mode == "wrapped":
        image = wrapped_bgr(image)
    elif preset.image_mode == "bgr":
        image = image[..., ::-1]
    return np.ascontiguousarray(image)


def unary(probabilities: np.ndarray, preset: Preset) -> np.ndarray:
    """Return the energies -log p, (C, H, W) float32, computed in the type `preset.unary_type`."""
    dtype = np.dtype(preset.unary_type)
    clipped = np.clip(probabilities.astype(dtype), dtype.type(preset.clip), dtype.type(1))
    with np.errstate(divide="ignore"):  # float16 rounds a very small preset.clip to 0
        return -np.log(clipped).astype(np.float32)
