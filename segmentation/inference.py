"""Inference: a trained network and an image -> class probabilities at the image's size."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

AVERAGES = ("probabilities", "logits")
RESIZES = {"linear": cv2.INTER_LINEAR, "cubic": cv2.INTER_CUBIC}
PRECISIONS = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # autocast types


@dataclass(frozen=True)
class Protocol:
    """Test protocol of a network. The defaults are deeplab-pytorch's: one forward pass at scale 1.

    Attributes:
        scales: factors of the image size.
        flip: also use the mirrored image, at every scale.
        average: quantity that is averaged over scales and mirrored images, at image size: "probabilities", or
            "logits" (SEAM), whose mean is then passed through softmax.
        align_corners: option of the bilinear resize of logits to image size.
        resize: interpolation of the normalized image, "linear" or "cubic" (SEAM).
        longer_side: pixels of the image's longer side at scale 1 (WeCLIP: 512); None keeps the image size.

    Raises:
        ValueError: `scales` is empty, a scale is not above 0, or `average` or `resize` is unknown.
    """

    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    average: str = "probabilities"
    align_corners: bool = False
    resize: str = "linear"
    longer_side: int | None = None

    def __post_init__(self):
        if not self.scales or not all(0 < scale < math.inf for scale in self.scales):
            raise ValueError(f"test scales must be numbers above 0, got {list(self.scales)}")
        if self.average not in AVERAGES:
            raise ValueError(f"average must be one of {', '.join(AVERAGES)}, got {self.average!r}")
        if self.resize not in RESIZES:
            raise ValueError(f"resize must be one of {', '.join(RESIZES)}, got {self.resize!r}")


class Segmented(NamedTuple):
    """Result for one image, on the network's device."""

    probabilities: Tensor  # (C, H, W) float32, summing to 1 over C
    logits: Tensor | None  # (C, h, w) float32, the network's output at scale 1; None without scale 1

    @property
    def labels(self) -> np.ndarray:
        """(H, W) uint8: the most probable class of each pixel."""
        return self.probabilities.argmax(0).to(torch.uint8).cpu().numpy()


@torch.inference_mode()
def infer(
    model: nn.Module,
    image: np.ndarray,
    protocol: Protocol,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
) -> Segmented:
    """Return the class probabilities of an image, averaged over scales and mirrored images.

    Args:
        model: (B, 3, h, w) -> logits (B, C, h', w'); in eval mode, on `device`, in any memory format.
        image: (3, H, W) float32, normalized as in training.
        protocol: scales, flip and averaging.
        device: device of the model.
        precision: a name in `PRECISIONS`, the type of the network's products; the softmax is float32.

    Raises:
        ValueError: the model is in training mode, the precision is unknown, the image is too small for a
            scale, or the network's output is not finite.
    """
    if model.training:
        raise ValueError("the model is in training mode: call model.eval() before inference")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    device, dtype = torch.device(device), PRECISIONS[precision]
    size = image.shape[1:]
    unit = 1 if protocol.longer_side is None else protocol.longer_side / max(size)
    total, count, unscaled = None, 0, None
    for scale in protocol.scales:
        pixels = rescale(image, scale * unit, protocol.resize)
        batch = torch.from_numpy(pixels)[None].to(device)  # (1, 3, h, w)
        if protocol.flip:
            batch = torch.cat([batch, batch.flip(-1)])  # (2, 3, h, w)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            logits = model(batch).float()  # (B, C, h', w')
        if scale == 1:
            unscaled = logits[0]
        full = F.interpolate(logits, size, mode="bilinear", align_corners=protocol.align_corners)
        if protocol.average == "probabilities":
            full = full.softmax(1)  # (B, C, H, W)
        if protocol.flip:
            full = torch.cat([full[:1], full[1:].flip(-1)])
        added = full.sum(0)  # (C, H, W)
        total = added if total is None else total.add_(added)
        count += len(full)
    mean = total / count
    probabilities = mean if protocol.average == "probabilities" else mean.softmax(0)
    if not probabilities.isfinite().all():
        raise ValueError("the network's output is not finite: give undamaged weights, or --precision fp32")
    return Segmented(probabilities, unscaled)


def rescale(image: np.ndarray, scale: float, resize: str = "linear") -> np.ndarray:
    """Return a normalized image (3, H, W) float32, resized by the factor `scale`, see `resize_by`."""
    pixels = np.ascontiguousarray(image.transpose(1, 2, 0))  # (H, W, 3)
    return np.ascontiguousarray(resize_by(pixels, scale, resize).transpose(2, 0, 1))


def resize_by(pixels: np.ndarray, scale: float, resize: str = "linear") -> np.ndarray:
    """Return an image (H, W, 3), uint8 or float32, resized by the factor `scale` with OpenCV.

    The sides of the result are rounded to integers, halves to the even integer. Source positions are computed
    from the factor, not from the rounded sides, with half-pixel centers and without antialiasing. `resize` is
    a name in `RESIZES`.

    Raises:
        ValueError: a side of the result would have 0 pixels.
    """
    if min(round(side * scale) for side in pixels.shape[:2]) < 1:
        raise ValueError(f"an image of {pixels.shape[:2]} (H, W) is too small for scale {scale:g}")
    if scale == 1:
        return pixels
    return cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=RESIZES[resize])
