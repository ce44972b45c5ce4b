"""Figures of segmented images: classes painted over the image, and a legend."""

from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from segmentation.benchmark import IGNORE
from segmentation.masks import overlay

OPACITY = 0.5  # opacity of the class colors, as in deeplab-pytorch's demo
TEXT, SWATCH, MARGIN, ROW = 15, 14, 8, 24  # sizes in the legend, in pixels


def labeled_overlay(
    image: np.ndarray, labels: np.ndarray, names: Sequence[str], palette: np.ndarray, has_background: bool
) -> np.ndarray:
    """Return an image with its classes painted over it, their outlines, and a legend below.

    Args:
        image: (H, W, 3) uint8 RGB.
        labels: (H, W) uint8; 255 is not painted.
        names: name of each mask value, including background.
        palette: (256, 3) uint8.
        has_background: whether the value 0 is background, which is not painted.

    Returns:
        (H + legend, W or the width of the longest name, 3) uint8 RGB.
    """
    clear = [0, IGNORE] if has_background else [IGNORE]
    painted = overlay(image, labels, palette, OPACITY, clear)
    square = np.ones((3, 3), np.uint8)
    edge = (cv2.dilate(labels, square) != cv2.erode(labels, square)) & ~np.isin(labels, clear)
    painted[edge] = palette[labels[edge]]  # outlines have the pure colors of the legend
    entries = [
        (names[value], tuple(palette[value].tolist())) for value in np.unique(labels) if value not in clear
    ]
    return with_legend(painted, entries or [("background only", (255, 255, 255))])


def with_legend(image: np.ndarray, entries: Sequence[tuple[str, tuple[int, int, int]]]) -> np.ndarray:
    """Return an image (H, W, 3) uint8 with a legend below: rows of colored squares and names, on white."""
    font = ImageFont.load_default(TEXT)
    widths = [round(font.getlength(name)) + SWATCH + 3 * MARGIN for name, _ in entries]
    height, width = image.shape[0], max(image.shape[1], *(entry + MARGIN for entry in widths))
    positions, x, y = [], MARGIN, height + MARGIN
    for entry in widths:
        if x + entry > width and x > MARGIN:  # start a new row
            x, y = MARGIN, y + ROW
        positions.append((x, y))
        x += entry
    canvas = Image.new("RGB", (width, y + ROW), "white")
    canvas.paste(Image.fromarray(image))
    draw = ImageDraw.Draw(canvas)
    for (name, color), (x, y) in zip(entries, positions, strict=True):
        draw.rectangle((x, y, x + SWATCH, y + SWATCH), fill=color, outline=(120, 120, 120))
        draw.text((x + SWATCH + MARGIN, y + SWATCH / 2), name, "black", font, anchor="lm")
    return np.asarray(canvas)
