"""The settings of TagCLIP."""

import math
from dataclasses import asdict, dataclass

from clip.positions import POSITION_ROUNDINGS
from common.settings import Settings, setting


@dataclass(frozen=True)
class TagSettings(Settings):
    """How images are tagged. The defaults are the published ones of ViT-B/16, stated for any tower."""

    affinity_layers: int | None = setting(
        3,
        "blocks before the last whose attention is averaged (that of the last never is); COCO-Stuff: all",
        least=1,
        none="all",
        aliases=["--averaged_blocks"],
    )
    voting_layers: int | None = setting(
        None, "last blocks that vote on related patches", least=1, none="all", aliases=["--voting_blocks"]
    )
    votes: int | None = setting(
        None,
        "blocks that must find two patches related (default: a third of those that vote, rounded up)",
        least=1,
    )
    vote_threshold: float = setting(
        1.0, "a block finds two patches related above this multiple of its mean attention", least=0
    )
    box_threshold: float = setting(
        1.0, "class boxes surround patches above this multiple of the mean of a class", least=0
    )
    ratio: float = setting(
        0.5,
        "scores above min + ratio * (max - min) count, for cropping a class and for labels; COCO-Stuff: 0.1",
        least=0,
        most=1,
    )
    cell_threshold: float = setting(
        0.5, "a class is cropped to the patches above this part of the range of its map", least=0, most=1
    )
    crop_size: int | None = setting(
        None, "side of a crop in pixels (default: the resolution of the model's training)", least=1
    )
    local_weight: float = setting(
        0.5, "weight of the first score, where a crop gives a second", least=0, most=1
    )
    diagonal_bias: float = setting(
        -100.0, "added to attention between different patches in the last block", most=0
    )
    crop_bias: float = setting(
        -1000.0, "added to the class token's attention to patches outside the class", most=0
    )
    include_edge: bool = setting(
        False,
        "let boxes and crops reach the grid's last row and column, which the reference cuts off",
        aliases=["--cover_edge"],
    )
    skip_empty_crops: bool = setting(
        False,
        "skip a class whose crop is empty; the reference implementation then skips all following classes too",
    )
    position_rounding: str = setting(
        "resampled", "when the positional table is rounded to float16", choices=POSITION_ROUNDINGS
    )
    round_weights: bool = setting(
        False, "round matrix weights to float16, as the CAM steps do and published tags do not"
    )
    max_patches: int = setting(10_000, "larger images are shrunk to this many patches", least=1)

    def check(self, layers: int, patch_size: int) -> None:
        """Raise ValueError if the settings do not fit a ViT of this depth and patch size."""
        if layers < 2:
            raise ValueError("tagging averages blocks before the last: the model's image tower has only one")
        for name, most in (("voting_layers", layers), ("votes", self.voting_layers or layers)):
            value = getattr(self, name)
            if value is not None and value > most:
                raise ValueError(f"{name} is {value}, with {most} blocks to choose from")
        if self.crop_size is not None and self.crop_size % patch_size:
            raise ValueError(f"crop_size {self.crop_size} is not a multiple of the patch, {patch_size}")

    def voters(self, layers: int) -> range:
        """Return the blocks that vote."""
        return range(layers - (self.voting_layers or layers), layers)

    def averaged(self, layers: int) -> range:
        """Return the blocks whose attention is averaged; a tower of few blocks has fewer of them."""
        last = layers - 1
        return range(0 if self.affinity_layers is None else max(0, last - self.affinity_layers), last)

    def votes_needed(self, layers: int) -> int:
        """Return the number of blocks that must agree."""
        return self.votes or math.ceil(len(self.voters(layers)) / 3)

    def record(self) -> dict:
        """Return what an output folder records."""
        values = asdict(self)
        return {"weights_rounded": values.pop("round_weights"), **values}


COCOSTUFF = TagSettings(affinity_layers=None, ratio=0.1)  # as published for it
