"""The settings of TagCLIP."""

import math
from dataclasses import asdict, dataclass

from clip.positions import POSITION_ROUNDINGS
from foundation.settings import Settings, setting


@dataclass(frozen=True)
class TagSettings(Settings):
    """Settings of tagging. The defaults are those published for ViT-B/16, in a form that fits any depth."""

    affinity_layers: int | None = setting(
        3,
        "number of blocks before the last one whose attention is averaged; COCO-Stuff: all",
        least=1,
        none="all",
        aliases=["--averaged_blocks"],
    )
    voting_layers: int | None = setting(
        None,
        "number of last blocks that vote on which patches are related",
        least=1,
        none="all",
        aliases=["--voting_blocks"],
    )
    votes: int | None = setting(
        None,
        "number of votes that makes two patches related (default: a third of the voting blocks, rounded up)",
        least=1,
    )
    vote_threshold: float = setting(
        1.0,
        "a block votes for two patches if their attention is above this multiple of the block's mean",
        least=0,
    )
    box_threshold: float = setting(
        1.0, "class boxes enclose patches above this multiple of the class map's mean", least=0
    )
    ratio: float = setting(
        0.5,
        "threshold min + ratio * (max - min) on the scores: first for the classes to crop, then for the "
        "labels; COCO-Stuff: 0.1",
        least=0,
        most=1,
    )
    cell_threshold: float = setting(
        0.5, "crops enclose patches above this fraction of the range of the class map", least=0, most=1
    )
    crop_size: int | None = setting(
        None, "side of a crop in pixels (default: the training resolution of the model)", least=1
    )
    local_weight: float = setting(
        0.5,
        "weight of the patch score of a cropped class; the probability in the crop has 1 - this weight",
        least=0,
        most=1,
    )
    diagonal_bias: float = setting(
        -100.0, "number added to the attention logits between different tokens in the last block", most=0
    )
    crop_bias: float = setting(
        -1000.0,
        "number added to the attention logits of the class token for patches outside the class",
        most=0,
    )
    include_edge: bool = setting(
        False,
        "let boxes and crops include the last row and column of patches, which the reference implementation "
        "leaves out",
        aliases=["--cover_edge"],
    )
    skip_empty_crops: bool = setting(
        False,
        "skip only a class whose crop is empty; the reference implementation also skips all classes after it",
    )
    position_rounding: str = setting(
        "resampled",
        "when the positional embedding is rounded to float16; resampled: if the patch grid differs from that "
        "of CLIP's training",
        choices=POSITION_ROUNDINGS,
    )
    round_weights: bool = setting(
        False, "round matrix weights to float16, as for CAMs; published tags use unrounded weights"
    )
    max_patches: int = setting(10_000, "images with more patches are shrunk to this many patches", least=1)

    def check(self, layers: int, patch_size: int) -> None:
        """Raise ValueError if the settings do not fit a ViT of this depth and patch size."""
        if layers < 2:
            raise ValueError(
                "tagging averages attention of blocks before the last, but this ViT has only one block: use "
                "a deeper ViT"
            )
        for name, most in (("voting_layers", layers), ("votes", self.voting_layers or layers)):
            value = getattr(self, name)
            if value is not None and value > most:
                raise ValueError(f"{name} is {value}, but {most} blocks can vote: give at most {most}")
        if self.crop_size is not None and self.crop_size % patch_size:
            raise ValueError(
                f"crop_size {self.crop_size} is not a multiple of the patch size {patch_size}: give a "
                "multiple"
            )

    def voters(self, layers: int) -> range:
        """Return the blocks that vote."""
        return range(layers - (self.voting_layers or layers), layers)

    def averaged(self, layers: int) -> range:
        """Return the blocks whose attention is averaged: up to `affinity_layers` blocks before the last."""
        last = layers - 1
        return range(0 if self.affinity_layers is None else max(0, last - self.affinity_layers), last)

    def votes_needed(self, layers: int) -> int:
        """Return the number of votes that relate two patches."""
        return self.votes or math.ceil(len(self.voters(layers)) / 3)

    def record(self) -> dict:
        """Return the settings under the names that an output folder records."""
        values = asdict(self)
        return {"weights_rounded": values.pop("round_weights"), **values}


COCOSTUFF = TagSettings(affinity_layers=None, ratio=0.1)  # published for COCO-Stuff
