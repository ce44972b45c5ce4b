"""What TagCLIP lets one choose; the defaults are the published settings, written for any tower."""

import math
from dataclasses import dataclass

from clip.positions import POSITION_ROUNDINGS


@dataclass(frozen=True)
class TagSettings:
    """How images are tagged. For the 12 blocks of ViT-B/16 the defaults are those of the public code.

    Attributes:
        averaged: blocks before the last whose attention is averaged (that of the last never is); None: all.
        voting: last blocks that vote; None: all.
        votes: how many must find two patches related; None: a third of those that vote, rounded up.
        vote_threshold: a block finds them so where its attention exceeds this multiple of its mean.
        box_threshold: what of a class's map is boxed: above this multiple of the map's mean.
        ratio: scores count from min + ratio * (max - min) on: which classes are looked at again (over all
            patches and names), and which become labels (over an image's scores). COCO-Stuff's is 0.1.
        cell_threshold: patches of a class, within the range of its map, that its crop consists of.
        crop_size: side of the crop as the tower sees it; None: what it was trained at.
        local_weight: of the first score, where a crop gives a second.
        diagonal_bias: 0 or less, added to what other patches say to a patch in the last block.
        crop_bias: 0 or less, added to what patches outside the class say to the class token.
        cover_edge: let boxes and crops reach the grid's last row and column. The public code cuts them off,
            so that what lies there alone is not seen; published numbers have it so.
        skip_empty_crops: pass over a class whose crop is empty. The public code then leaves the image at
            once, classes that follow included; published numbers have it so.
        position_rounding: see `clip.positions`; the public code rounds tables that it resamples.
        max_patches: a larger image is shrunk to this many.

    Raises:
        ValueError: a setting out of range.
    """

    averaged: int | None = 3
    voting: int | None = None
    votes: int | None = None
    vote_threshold: float = 1.0
    box_threshold: float = 1.0
    ratio: float = 0.5
    cell_threshold: float = 0.5
    crop_size: int | None = None
    local_weight: float = 0.5
    diagonal_bias: float = -100.0
    crop_bias: float = -1000.0
    cover_edge: bool = False
    skip_empty_crops: bool = False
    position_rounding: str = "resampled"
    max_patches: int = 10_000

    def __post_init__(self):
        for name in ("averaged", "voting", "votes", "crop_size", "max_patches"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        for name in ("ratio", "cell_threshold", "local_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name):g}")
        for name in ("diagonal_bias", "crop_bias"):
            if not getattr(self, name) <= 0:
                raise ValueError(f"{name} must be 0 or less, got {getattr(self, name):g}")
        for name in ("vote_threshold", "box_threshold"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name):g}")
        if self.position_rounding not in POSITION_ROUNDINGS:
            raise ValueError(f"position_rounding must be one of {', '.join(POSITION_ROUNDINGS)}")

    def check(self, layers: int, patch_size: int) -> None:
        """Do they fit a tower of so many blocks?

        Raises:
            ValueError: they do not.
        """
        if layers < 2:
            raise ValueError("tagging averages blocks before the last: the model's image tower has only one")
        for name, most in (("voting", layers), ("votes", self.voting or layers)):
            value = getattr(self, name)
            if value is not None and value > most:
                raise ValueError(f"{name} is {value}, with {most} blocks to choose from")
        if self.crop_size is not None and self.crop_size % patch_size:
            raise ValueError(f"crop_size {self.crop_size} is not a multiple of the patch, {patch_size}")

    def voters(self, layers: int) -> range:
        """The blocks that vote."""
        return range(layers - (self.voting or layers), layers)

    def averaging(self, layers: int) -> range:
        """The blocks whose attention is averaged; a tower of few blocks has fewer of them."""
        last = layers - 1
        return range(0 if self.averaged is None else max(0, last - self.averaged), last)

    def votes_needed(self, layers: int) -> int:
        """Blocks that must agree."""
        return self.votes or math.ceil(len(self.voters(layers)) / 3)


PRESETS = {
    "tagclip": TagSettings(),
    "cocostuff": TagSettings(averaged=None, ratio=0.1),
}
