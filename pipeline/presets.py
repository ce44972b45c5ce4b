"""Published pipelines: the defaults in which they differ."""
from collections.abc import Callable

from pipeline.cams import CamSettings
from pipeline.masks import MaskSettings
from segmentation.benchmark import Benchmark

# --confidence, and the benchmarks on which --exclude_last_layer is the default.
PRESETS = {
    "clip_es": {"confidence": MaskSettings.confidence, "exclude_last_layer": ()},
    # TagCLIP's copy of CLIP-ES; only its VOC script takes [-8:-1] of the attention maps.
    "cls_seg": {"confidence": 0.0, "exclude_last_layer": ("voc12",)},
}


def add_preset_flag(flag: Callable) -> None:
    """Add --preset, which decides where --confidence or --exclude_last_layer are not given."""
    flag("--preset", choices=PRESETS, default="clip_es", help="published defaults: those of CLIP-ES, or of "
         "CLS-SEG (TagCLIP's segmentation without labels): no pixel of a mask becomes 255, and on voc12 the "
         "last block's attention is left out; flags that are given take precedence")  # fmt: skip


def cam_defaults(preset: str, benchmark: Benchmark) -> CamSettings:
    """Return the CAM settings of a preset on a benchmark."""
    return CamSettings(
        exclude_last_layer=benchmark.name in PRESETS[preset]["exclude_last_layer"],
        box_threshold=benchmark.box_threshold,
    )


def mask_defaults(preset: str) -> MaskSettings:
    """Return the mask settings of a preset."""
    return MaskSettings(confidence=PRESETS[preset]["confidence"])
