"""Images for and with CAMs, at the same module path as in the pytorch-grad-cam package."""
from collections.abc import Sequence

import cv2
import numpy as np
from torch import Tensor
from torchvision.transforms.functional import normalize, to_tensor

HALF = (0.5, 0.5, 0.5)
TOLERANCE = 1e-4  # rounding of a resized image or CAM


def preprocess_image(img: np.ndarray, mean: Sequence[float] = HALF, std: Sequence[float] = HALF) -> Tensor:
    """Return a normalized batch (1, 3, H, W) of one image (H, W, 3), float in [0, 1] or uint8."""
    return normalize(to_tensor(img.copy()), mean, std)[None]


def deprocess_image(img: np.ndarray) -> np.ndarray:
    """Return an array of any range as uint8, with mean 0.5 * 255 and standard deviation 0.1 * 255."""
    standard = (img - img.mean()) / (img.std() + 1e-5)
    return np.uint8((standard * 0.1 + 0.5).clip(0, 1) * 255)


def show_cam_on_image(
    img: np.ndarray,
    mask: np.ndarray,
    use_rgb: bool = False,
    colormap: int = cv2.COLORMAP_JET,
    image_weight: float = 0.5,
) -> np.ndarray:
    """Return the CAM as a heatmap over the image, (H, W, 3) uint8.

    Args:
        img: (H, W, 3) float in [0, 1].
        mask: (H, W) float in [0, 1], the CAM of the image.
        use_rgb: `img` is RGB, not BGR.
        colormap: of OpenCV.
        image_weight: the overlay is image_weight * img + (1 - image_weight) * heatmap, divided by its
            maximum.

    Raises:
        ValueError: a shape, type or value is not as described.
    """
    img, mask = np.asarray(img), np.asarray(mask)
    if img.ndim != 3 or img.shape[2] != 3:
        raise ValueError(f"img must be of shape (H, W, 3), got {img.shape}")
    if mask.shape != img.shape[:2]:
        raise ValueError(
            f"mask must be of shape {img.shape[:2]}, the size of img, got {mask.shape}: give the CAM of one "
            "image, such as cams[0], resized to the image"
        )
    if img.dtype.kind != "f":
        raise ValueError(f"img must be float in [0, 1], got {img.dtype}: divide 8-bit values by 255")
    for name, values in (("img", img), ("mask", mask)):
        low, high = values.min(initial=1), values.max(initial=0)
        if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):  # also for NaN
            raise ValueError(f"{name} must be in [0, 1], got values in [{low:g}, {high:g}]")
    if not 0 <= image_weight <= 1:
        raise ValueError(f"image_weight must be in [0, 1], got {image_weight}")
    heatmap = cv2.applyColorMap(np.uint8(255 * mask.clip(0, 1)), colormap)  # BGR
    heatmap = np.float32(heatmap[..., ::-1] if use_rgb else heatmap) / 255
    overlay = (1 - image_weight) * heatmap + image_weight * img.clip(0, 1)
    return np.uint8(255 * overlay / max(overlay.max(), 1e-7))  # an all-black overlay stays black
