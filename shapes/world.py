"""The drawn world: images of named objects on named backgrounds, with exact masks and captions.

A class is a shape, a texture and a range of colors. Four pairs of classes have the same color, so that
shape and texture matter. Edges are sharp, because the dense CRF expects sharp object boundaries. An image of
64 x 64 pixels takes about half a millisecond, so training can draw its images on the fly.
"""
import colorsys
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

STREAMS = {"train": 0, "val": 1, "clip": 2}  # part of each image's seed, so that streams share no image
MAX_OBJECTS, MAX_CLASSES = 4, 3  # per image
RADIUS = (0.17, 0.36)  # range of object radii, relative to the image's shorter side
MIN_DISTANCE = 0.6  # minimum distance of two object centers, relative to the sum of the radii
PLACEMENT_TRIES = 8
DIFFICULT_BELOW = 0.5  # objects with a smaller visible fraction are annotated as "difficult"
CONTRAST = 26  # amplitude of a texture, in gray levels
CAPTION_TEMPLATES = (
    "a photo of {}.",
    "a picture of {}.",
    "a drawing with {}.",
    "a clean origami {}.",
    "an image showing {}.",
    "{}.",
)


# Shapes: closed contours in the unit disc, y downwards. A contour inside another is a hole.

_T = np.linspace(0, 2 * np.pi, 40, endpoint=False)  # angles of the points of a contour


def _polar(radius: float | np.ndarray, points: int = len(_T)) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
    return np.stack([radius * np.sin(angle), -radius * np.cos(angle)], 1)


def _leaf() -> np.ndarray:
    x = np.linspace(-1, 1, 20)
    y = 0.55 * (1 - x**2)
    return np.concatenate([np.stack([x, y], 1), np.stack([-x, -y], 1)])


def _moon() -> np.ndarray:
    outer = np.linspace(np.pi / 3, 5 * np.pi / 3, 26)
    inner = np.linspace(-np.pi / 2, -1.5 * np.pi, 14)
    tip = np.sqrt(3) / 2
    return np.concatenate([
        np.stack([np.cos(outer), np.sin(outer)], 1),
        np.stack([0.5 + 0.85 * tip * np.cos(inner), tip * np.sin(inner)], 1),
    ])


SHAPES: dict[str, list[np.ndarray]] = {
    "disc": [_polar(1)],
    "heart": [np.stack([
        16 * np.sin(_T)**3,
        -(13 * np.cos(_T) - 5 * np.cos(2 * _T) - 2 * np.cos(3 * _T) - np.cos(4 * _T)),
    ], 1) / 17],
    "square": [0.85 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])],
    "cross": [np.array([
        (-.38, -1), (.38, -1), (.38, -.38), (1, -.38), (1, .38), (.38, .38),
        (.38, 1), (-.38, 1), (-.38, .38), (-1, .38), (-1, -.38), (-.38, -.38),
    ])],
    "diamond": [np.array([(0, -1), (.75, -.2), (0, 1), (-.75, -.2)])],
    "star": [_polar(np.where(np.arange(10) % 2, 0.45, 1.0), 10)],
    "triangle": [np.array([(0, -1), (.9, .8), (-.9, .8)])],
    "leaf": [_leaf()],
    "ring": [_polar(1), _polar(0.45)],
    "drop": [np.stack([1.1 * np.sin(_T) * np.sin(_T / 2)**2, -np.cos(_T)], 1)],
    "moon": [_moon()],
    "flower": [_polar(0.78 + 0.22 * np.cos(5 * _T))],
}


# Textures: (y, x) pixel coordinates, a period in pixels, an angle -> a field in [-1, 1].

def _stripes(y: np.ndarray, x: np.ndarray, period: float, angle: float) -> np.ndarray:
    phase = (x * np.cos(angle) + y * np.sin(angle)) * (1 / period)
    return np.where(phase - np.floor(phase) < 0.5, 1.0, -1.0)


def _checks(y: np.ndarray, x: np.ndarray, period: float, angle: float) -> np.ndarray:
    return _stripes(y, x, 1.5 * period, angle) * _stripes(y, x, 1.5 * period, angle + np.pi / 2)


def _dots(y: np.ndarray, x: np.ndarray, period: float, angle: float) -> np.ndarray:
    wave = 2 * np.pi / (1.2 * period)
    u, v = wave * np.cos(angle), wave * np.sin(angle)
    return np.where(np.cos(u * x + v * y) + np.cos(v * x - u * y) > 0.6, 1.0, -0.4)


def _plain(y: np.ndarray, x: np.ndarray, period: float, angle: float) -> np.ndarray:
    return np.zeros(np.broadcast_shapes(y.shape, x.shape))


def _bricks(y: np.ndarray, x: np.ndarray, period: float, angle: float) -> np.ndarray:
    row = np.floor(y / period)
    along = (x / (2 * period) + 0.5 * (row % 2)) % 1
    return np.where((y - row * period < 1) | (along < 0.5 / period), -1.0, 0.5)


def _waves(y: np.ndarray, x: np.ndarray, period: float, angle: float) -> np.ndarray:
    return np.sin((y + 1.5 * np.sin(x * (1 / period) + angle)) * (2 * np.pi / (1.3 * period)))


@dataclass(frozen=True)
class Kind:
    """Appearance of a class or of a background.

    Attributes:
        hue, saturation, value: center of the range of colors; hue in degrees, the others in [0, 1].
        shape: key of SHAPES; empty for backgrounds.
        grain: amplitude of per-pixel noise, in gray levels.
    """

    name: str
    hue: float
    saturation: float
    value: float
    texture: Callable[[np.ndarray, np.ndarray, float, float], np.ndarray]
    shape: str = ""
    grain: int = 1


CLASSES = (
    Kind("ball", 0, 0.80, 0.80, _stripes, "disc"),
    Kind("heart", 0, 0.80, 0.80, _dots, "heart"),
    Kind("box", 28, 0.85, 0.85, _bricks, "square"),
    Kind("cross", 325, 0.50, 0.90, _plain, "cross"),
    Kind("kite", 54, 0.85, 0.88, _checks, "diamond"),
    Kind("star", 54, 0.85, 0.88, _waves, "star"),
    Kind("tree", 140, 0.80, 0.50, _dots, "triangle"),
    Kind("leaf", 140, 0.80, 0.50, _plain, "leaf"),
    Kind("ring", 222, 0.80, 0.80, _stripes, "ring"),
    Kind("drop", 222, 0.80, 0.80, _plain, "drop"),
    Kind("moon", 180, 0.55, 0.85, _checks, "moon"),
    Kind("flower", 278, 0.65, 0.75, _dots, "flower"),
)
BACKGROUNDS = (
    Kind("grass", 88, 0.45, 0.58, _plain, grain=12),
    Kind("sand", 40, 0.30, 0.80, _plain, grain=8),
    Kind("water", 200, 0.35, 0.62, _waves),
    Kind("brick", 14, 0.40, 0.55, _bricks),
    Kind("snow", 210, 0.04, 0.95, _plain, grain=3),
    Kind("night", 235, 0.45, 0.22, _plain, grain=5),
    Kind("wood", 26, 0.50, 0.42, _stripes),
    Kind("road", 230, 0.04, 0.42, _plain, grain=10),
)


@dataclass(frozen=True)
class Drawn:
    """One drawn object.

    Attributes:
        label: class index, 0-based.
        box: bounding box of the visible pixels (x0, y0, x1, y1), ends exclusive.
        visible: fraction of the object that no other object hides.
    """

    label: int
    box: tuple[int, int, int, int]
    visible: float


@dataclass(frozen=True)
class Scene:
    """One drawn image with its annotation.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        mask: (H, W) uint8, 0 background, k + 1 class k.
        background: index into BACKGROUNDS.
    """

    image: np.ndarray
    mask: np.ndarray
    objects: list[Drawn]
    background: int
    caption: str

    @property
    def labels(self) -> list[int]:
        """Class indices without repetition, in the order of their first object."""
        return list(dict.fromkeys(drawn.label for drawn in self.objects))


def generator(seed: int, index: int, stream: str = "train") -> np.random.Generator:
    """Return the random generator of one image, independent of other images."""
    return np.random.default_rng((seed, STREAMS[stream], index))


def _paint(kind: Kind, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Return (height, width, 3) uint8: a color near that of `kind`, modulated by its texture and grain."""
    hue, saturation, value, period, angle = rng.uniform(-1, 1, 5).tolist()
    color = colorsys.hsv_to_rgb(
        (kind.hue + 7 * hue) / 360 % 1,
        min(max(kind.saturation + 0.08 * saturation, 0), 1),
        min(kind.value + 0.07 * value, 1),
    )
    y, x = np.ogrid[:height, :width]
    y, x = y.astype(np.float32), x.astype(np.float32)
    field = kind.texture(y, x, 5 + 1.2 * period, np.pi * angle)
    grain = rng.integers(-kind.grain, kind.grain, (height, width), np.int8, endpoint=True)
    reach = CONTRAST + kind.grain
    levels = (CONTRAST * field).astype(np.intp) + grain  # within +- reach
    shades = np.arange(-reach, reach + 1)[:, None] + 255 * np.array(color)
    return np.clip(shades, 0, 255).astype(np.uint8)[levels + reach]


def _place(height: int, width: int, placed: list, rng: np.random.Generator) -> tuple | None:
    """Return a center and radius (x, y, r) at a minimum distance from the objects in `placed`, or None."""
    for _ in range(PLACEMENT_TRIES):
        radius = rng.uniform(*RADIUS) * min(height, width)
        x, y = rng.uniform(0.1, 0.9, 2) * (width, height)
        if all(np.hypot(x - a, y - b) >= MIN_DISTANCE * (radius + r) for a, b, r in placed):
            return x, y, radius
    return None


def _outline(kind: Kind, x: float, y: float, radius: float, rng: np.random.Generator) -> list[np.ndarray]:
    """Return the contours of an object in pixels, rotated by up to 30 degrees and narrowed by up to 15 %."""
    angle = rng.uniform(-np.pi / 6, np.pi / 6)
    cosine, sine = np.cos(angle), np.sin(angle)
    stretch = np.array([[rng.uniform(0.85, 1), 0], [0, 1]])
    turn = radius * np.array([[cosine, -sine], [sine, cosine]]) @ stretch
    return [contour @ turn.T + (x, y) for contour in SHAPES[kind.shape]]


def _silhouette(contours: list[np.ndarray], x: float, y: float, size: tuple[int, int]) -> tuple:
    """Return the window of an object (two slices) and its pixels in the window (bool, at least one True)."""
    height, width = size
    corners = np.concatenate(contours)
    x0, y0 = np.maximum(np.floor(corners.min(0)).astype(int), 0)
    x1, y1 = np.minimum(np.ceil(corners.max(0)).astype(int) + 1, (width, height))
    inside = np.zeros((y1 - y0, x1 - x0), np.uint8)
    bits = 4  # OpenCV draws corners in fixed point with this number of fractional bits
    fixed = [np.round((contour - (x0, y0)) * 2**bits).astype(np.int32) for contour in contours]
    cv2.fillPoly(inside, fixed, 1, shift=bits)
    if not inside.any():  # thinner than a pixel
        inside[int(y) - y0, int(x) - x0] = 1
    return (slice(y0, y1), slice(x0, x1)), inside.astype(bool)


def _visible(instances: np.ndarray, labels: list[int], areas: list[int]) -> list[Drawn]:
    """Return the objects with visible pixels; `areas` are the pixel counts before occlusion."""
    objects = []
    for number, (label, area) in enumerate(zip(labels, areas, strict=True), 1):
        pixels = (instances == number).view(np.uint8)
        x, y, width, height = cv2.boundingRect(pixels)
        if width:
            visible = int(np.count_nonzero(pixels)) / area
            objects.append(Drawn(label, (x, y, x + width, y + height), visible))
    return objects


def draw(seed: int, index: int, size: tuple[int, int], stream: str = "train") -> Scene:
    """Draw image `index` of a stream (see STREAMS): 1 - 4 objects of 1 - 3 classes on a background.

    Args:
        size: (H, W), at least 1 x 1; objects scale with the shorter side, textures do not.

    Returns:
        The same scene for the same arguments.

    Raises:
        ValueError: a side is below 1.
    """
    height, width = size
    if height < 1 or width < 1:
        raise ValueError(f"image sides must be at least one pixel, got {height} x {width}")
    rng = generator(seed, index, stream)
    background = int(rng.integers(len(BACKGROUNDS)))
    image = _paint(BACKGROUNDS[background], height, width, rng)
    instances = np.zeros((height, width), np.uint8)  # 0, or the object's number from 1
    chosen = rng.permutation(len(CLASSES))[: rng.integers(1, MAX_CLASSES + 1)]
    again = rng.integers(0, len(chosen), rng.integers(0, MAX_OBJECTS - len(chosen) + 1))
    labels, areas, placed = [], [], []
    for label in (*chosen, *chosen[again]):
        place = _place(height, width, placed, rng)
        if place is None:
            continue
        x, y, _ = place
        window, inside = _silhouette(_outline(CLASSES[label], *place, rng), x, y, size)
        placed.append(place)
        labels.append(int(label))
        areas.append(int(inside.sum()))
        image[window][inside] = _paint(CLASSES[label], *inside.shape, rng)[inside]
        instances[window][inside] = len(labels)
    objects = _visible(instances, labels, areas)
    mask = np.array([0, *(label + 1 for label in labels)], np.uint8)[instances]
    *first, last = (CLASSES[label].name for label in dict.fromkeys(drawn.label for drawn in objects))
    phrase = f"{', '.join(first)} and {last}" if first else last  # such as "ball, kite and ring"
    template = CAPTION_TEMPLATES[rng.integers(len(CAPTION_TEMPLATES))]
    caption = template.format(f"{phrase} on {BACKGROUNDS[background].name}")
    return Scene(image, mask, objects, background, caption)
