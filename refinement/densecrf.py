"""The dense CRF: class probabilities follow the edges of the image.

Fully connected pairwise terms with Gaussian kernels, mean-field inference on the permutohedral lattice
(Kraehenbuehl and Koltun, NeurIPS 2011). Published systems differ in kernels, iterations and in what
they feed in; each is a preset.
"""

from dataclasses import dataclass

import numpy as np

IMAGE_MODES = ("raw", "wrapped")
UNARY_TYPES = ("float16", "float32")

# Caffe's ImageNet means (B, G, R), which CLIP-ES subtracts from the image it gives to the CRF.
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
        image_mode: "raw", or "wrapped" (see `wrapped_bgr`), which gives the published CLIP-ES numbers.
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
}


def densecrf(
    image: np.ndarray,
    probabilities: np.ndarray,
    preset: str | Preset = "clip_es",
    backend: str = "pydensecrf",
) -> np.ndarray:
    """Class posteriors of a dense CRF.

    Args:
        image: (H, W, 3) uint8 RGB.
        probabilities: (C, H, W) float, in [0, 1], not necessarily summing to 1; background included.
        preset: a name in `PRESETS`, or one of your own.
        backend: a name in `BACKENDS`.

    Returns:
        (C, H, W) float32, summing to 1 over C.

    Raises:
        ValueError: shapes that do not fit, an unknown preset or backend, or a backend not installed.
    """
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise ValueError(f"no CRF preset {preset!r}, there are {', '.join(PRESETS)}")
        preset = PRESETS[preset]
    if backend not in BACKENDS:
        raise ValueError(f"no CRF backend {backend!r}, there are {', '.join(BACKENDS)}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"the CRF needs an (H, W, 3) uint8 image, got {image.shape} {image.dtype}")
    if probabilities.ndim != 3 or probabilities.shape[1:] != image.shape[:2]:
        raise ValueError(
            f"class probabilities are {probabilities.shape[1:]} but the image is {image.shape[:2]} (H, W)"
        )
    guide = wrapped_bgr(image) if preset.image_mode == "wrapped" else image
    return BACKENDS[backend](np.ascontiguousarray(guide), unary(probabilities, preset), preset)


def wrapped_bgr(image: np.ndarray) -> np.ndarray:
    """CLIP-ES's CRF image: means subtracted, then cast to 8 bits, where what is negative wraps around.

    Grey levels just below a channel's mean thus lie far from those just above it. The public cast is
    undefined in C and happens to be this on x86; here it is modulo 256 on any machine.

    Args:
        image: (H, W, 3) uint8 RGB.

    Returns:
        (H, W, 3) uint8 BGR, trunc(value - mean) modulo 256.
    """
    shifted = image[..., ::-1].astype(np.float32) - MEAN_BGR
    return (np.trunc(shifted).astype(np.int32) % 256).astype(np.uint8)


def unary(probabilities: np.ndarray, preset: Preset) -> np.ndarray:
    """Energies -log p in the preset's type: (C, H, W) -> (C, H, W) float32."""
    dtype = np.dtype(preset.unary_type)
    clipped = np.clip(probabilities.astype(dtype), dtype.type(preset.clip), dtype.type(1))
    return -np.log(clipped).astype(np.float32)


def _pydensecrf(image: np.ndarray, energies: np.ndarray, preset: Preset) -> np.ndarray:
    """The CPU reference: Kraehenbuehl's own code, wrapped."""
    try:
        from pydensecrf.densecrf import DenseCRF2D
    except ImportError:
        raise ValueError("the dense CRF needs pydensecrf2: pip install pydensecrf2") from None
    channels, height, width = energies.shape
    crf = DenseCRF2D(width, height, channels)
    crf.setUnaryEnergy(np.ascontiguousarray(energies.reshape(channels, -1)))  # (C, H * W)
    crf.addPairwiseGaussian(sxy=preset.gaussian_sxy, compat=preset.gaussian_compat)
    crf.addPairwiseBilateral(
        sxy=preset.bilateral_sxy, srgb=preset.bilateral_srgb, rgbim=image, compat=preset.bilateral_compat
    )
    posterior = crf.inference(preset.iterations)
    return np.array(posterior, np.float32).reshape(channels, height, width)


BACKENDS = {"pydensecrf": _pydensecrf}
