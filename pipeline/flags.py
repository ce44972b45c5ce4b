"""Flags that scripts share, their types, and how every --help looks."""
import argparse
import math
from dataclasses import replace

from pipeline.masks import CONFIDENCE, MAX_PIXELS
from refinement.densecrf import BACKENDS, IMAGE_MODES, UNARY_TYPES, Preset
from refinement.densecrf import PRESETS as CRF_PRESETS
from segmentation.benchmark import Benchmark

# What published pipelines differ in: the default of --confidence, and the benchmarks on which
# --leave_out_last is the default.
PRESETS = {
    "clip_es": {"confidence": CONFIDENCE, "leave_out_last": ()},
    # TagCLIP's copy of CLIP-ES, whose VOC script alone takes [-8:-1] of the attention maps.
    "cls_seg": {"confidence": 0.0, "leave_out_last": ("voc12",)},
}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Tells the defaults that say something: not those of switches or of flags left out."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default in (None, False):
            return action.help
        return super()._get_help_string(action)


def count(text: str) -> int:
    """Argument type: a whole number, 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("expected a whole number, 1 or more")
    return int(text)


def workers(text: str) -> int:
    """Argument type: a whole number, 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError("expected a whole number, 0 or more")
    return int(text)


def share(text: str) -> float:
    """Argument type: a number from 0 to 1."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError("expected a number from 0 to 1")
    return number


def factors(text: str) -> tuple[float, ...]:
    """Argument type: scales."""
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = (math.nan,)
    if not all(0.1 <= factor <= 10 for factor in found):
        raise argparse.ArgumentTypeError("expected numbers from 0.1 to 10, separated by commas")
    return found


def add_preset_flag(parser: argparse.ArgumentParser) -> None:
    """Which of `PRESETS`; it decides where the flags it concerns are left out."""
    parser.add_argument("--preset", choices=PRESETS, default="clip_es", help="published defaults: CLIP-ES's, "
                        "or CLS-SEG's, TagCLIP's segmentation without labels: no pixel of a mask becomes "
                        "255, and on voc12 the last block's attention is left out; flags that are given "
                        "win")  # fmt: skip


def leave_out_last(args: argparse.Namespace, benchmark: Benchmark) -> bool:
    """What --leave_out_last says, or else the preset."""
    if args.leave_out_last is None:
        return benchmark.name in PRESETS[args.preset]["leave_out_last"]
    return args.leave_out_last


def confidence(args: argparse.Namespace) -> float:
    """What --confidence says, or else the preset."""
    return PRESETS[args.preset]["confidence"] if args.confidence is None else args.confidence


def add_crf_flags(parser: argparse.ArgumentParser, backend: str) -> None:
    """How the dense CRF makes masks; `backend` is the default one."""
    flag = parser.add_argument_group("how the dense CRF runs (the defaults are CLIP-ES's)").add_argument
    preset = CRF_PRESETS["clip_es"]
    backends = [*BACKENDS] if backend in BACKENDS else [backend, *BACKENDS]
    flag("--confidence", type=share, help="a pixel of lower posterior becomes 255 (without it: as "
         f"--preset says, {CONFIDENCE} or, with cls_seg, none does)")  # fmt: skip
    flag("--crf_backend", choices=backends, default=backend, help="what runs it: numba (CPU), torch (many "
         "images at once on a GPU), or pydensecrf, the reference; auto: torch on a GPU, else numba. Their "
         "labels agree")  # fmt: skip
    flag("--crf_image", choices=IMAGE_MODES, default=preset.image_mode, help="image the CRF sees: "
         "mean-subtracted and wrapped to 8 bits, as published numbers need, or as it is, RGB or "
         "BGR")  # fmt: skip
    flag("--crf_unary", choices=UNARY_TYPES, default=preset.unary_type, help="type its energies are computed "
         "in; published numbers use float16")  # fmt: skip
    flag("--crf_max_pixels", type=count, default=MAX_PIXELS, help="on larger images the CRF runs at a size "
         "of so many, for the sake of memory")  # fmt: skip


def crf_preset(args: argparse.Namespace) -> Preset:
    """What the flags say."""
    return replace(CRF_PRESETS["clip_es"], image_mode=args.crf_image, unary_type=args.crf_unary)
