"""Convert masks of other tools to the index masks that all commands read.

`python -m pipeline.convert_masks --help`. Masks of other tools have colors (RGB, RGBA, palette), the values 0
and 255, or 16 bits. Index masks are palette PNGs: 0 is background, k + 1 is class k, 255 is ignored.
"""
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any

import numpy as np
import yaml
from PIL import Image

from foundation.cli import Parser
from foundation.logs import log
from foundation.settings import count
from foundation.yamlfile import read_root
from pipeline.processes import Outcome, cores
from pipeline.run import SHOWN, Record, Run, command
from pipeline.step import Step
from segmentation.benchmark import IGNORE, voc_palette
from segmentation.images import without_alpha
from segmentation.masks import decode_lossless, is_complete, stored_values, write_mask

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")  # also in capitals
UNKNOWN = -1  # entry of `ConvertStep.lookup` for codes that are not mapped
Code = int  # a gray value, or a color as red * 65536 + green * 256 + blue


@dataclass
class ConvertStep(Step):
    """Converts masks; `decode` returns the complete outcome.

    Attributes:
        files: name of a mask, which may have folders -> its file.
        output: folder of the index masks.
        mapping: code -> value of the index mask.
        flag: the flag that gave the mapping, shown in errors.
        colors: whether the codes are colors; False: gray values.
        ignore_unknown: make pixels of unknown codes 255; False: their masks fail.
    """

    files: Mapping[str, str]
    output: str
    mapping: Mapping[Code, int]
    flag: str
    colors: bool
    ignore_unknown: bool = False

    def __post_init__(self):
        self.unknown: dict[Code, tuple[int, str]] = {}

    def is_done(self, name: str) -> bool:
        return is_complete(self._output_file(name))

    def start(self, worker_index: int) -> None:
        self.lookup = np.full(2**24 if self.colors else 2**16, UNKNOWN, np.int16)
        for code, value in self.mapping.items():
            self.lookup[code] = value

    def decode(self, name: str) -> Outcome:
        file = self.files[name]
        image = decode_lossless(file)
        codes = color_codes(image, file) if self.colors else gray_codes(image, file, self.mapping)
        values = self.lookup[codes]  # (H, W) int16
        unknown = Counter(codes[values == UNKNOWN].tolist()).most_common()
        if unknown and not self.ignore_unknown:
            listed = ", ".join(f"{self._named(code)} in {pixels} pixels" for code, pixels in unknown[:SHOWN])
            raise ValueError(
                f"mask {file} has {len(unknown)} {self._kind} that {self.flag} does not map: {listed}"
                f"{', ...' if len(unknown) > SHOWN else ''}; add them, or give --unknown ignore"
            )
        for code, pixels in unknown[:SHOWN]:
            before, first = self.unknown.get(code, (0, file))
            self.unknown[code] = before + pixels, first
        values[values == UNKNOWN] = IGNORE
        write_mask(self._output_file(name), values.astype(np.uint8), voc_palette())
        return Outcome(name, notes=(f"masks with unknown {self._kind}",) if unknown else ())

    def finish(self) -> dict[Code, tuple[int, str]]:
        """Return the unknown codes that became 255: code -> pixels, and the first file. Only the most
        frequent codes of each mask are counted."""
        return self.unknown

    def log_unknown(self, parts: Sequence[Mapping[Code, tuple[int, str]]]) -> None:
        """Log the most frequent unknown codes of all processes, see `finish`."""
        pixels, first = Counter(), {}
        for part in parts:
            for code, (number, file) in part.items():
                pixels[code] += number
                first[code] = min(file, first.get(code, file))
        for code, number in pixels.most_common(SHOWN):
            name = self._named(code)
            log.warning("%s became %d: %d pixels, first in %s", name, IGNORE, number, first[code])

    @property
    def _kind(self) -> str:
        return "colors" if self.colors else "values"

    def _named(self, code: Code) -> str:
        return str((code >> 16, code >> 8 & 255, code & 255) if self.colors else code)

    def _output_file(self, name: str) -> Path:
        return Path(self.output) / f"{name}.png"


def color_codes(image: Image.Image, file: str) -> np.ndarray:
    """Return the colors (H, W) int32 of an image, without alpha, see `Code`.

    Raises:
        ValueError: the image has more than 8 bits.
    """
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"mask {file} has more than 8 bits (mode {image.mode}), not colors: give --values")
    red, green, blue = np.moveaxis(np.asarray(without_alpha(image).convert("RGB"), np.int32), -1, 0)
    return red << 16 | green << 8 | blue


def gray_codes(image: Image.Image, file: str, mapping: Mapping[Code, int]) -> np.ndarray:
    """Return the stored values (H, W) of a gray image, or the indices of a palette image.

    White of a 1-bit image is 1 if `mapping` contains 1, else 255.

    Raises:
        ValueError: the image has colors, or a value that is not a whole number in 0..65535.
    """
    if image.mode in ("P", "L") and image.format != "GIF":  # programs renumber the palette of a GIF
        return stored_values(image, file)
    if image.mode == "1":
        return np.asarray(image).astype(np.int32) * (1 if 1 in mapping else 255)
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        fits = (values >= 0) & (values < 2**16) & (values == np.floor(values))
        if not fits.all():
            wrong = values[~fits][0]
            raise ValueError(f"mask {file} has the value {wrong}, expected whole numbers in 0..65535")
        return values.astype(np.int64)
    pixels = np.asarray(without_alpha(image).convert("RGB"))
    if (pixels != pixels[..., :1]).any():
        raise ValueError(f"mask {file} has colors, not gray values: give --colors or --palette voc")
    return pixels[..., 0]


def mask_files(folder: str | Path) -> dict[str, str]:
    """Return the masks in a folder and its subfolders, sorted: path without suffix -> file.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: it contains no masks, or two whose names differ only in the suffix.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"--input: folder {folder} does not exist: give the folder of the masks")
    files: dict[str, str] = {}
    for file in sorted(Path(folder).rglob("*")):
        # File managers write hidden files.
        if file.suffix.lower() not in SUFFIXES or file.name.startswith(".") or not file.is_file():
            continue
        name = file.relative_to(folder).with_suffix("").as_posix()
        if files.setdefault(name, str(file)) != str(file):
            raise ValueError(f"--input: {files[name]} and {file.name} have the same name: rename one")
    if not files:
        raise ValueError(f"--input: folder {folder} contains no masks ({', '.join(SUFFIXES)})")
    return files


def read_colors(file: str) -> dict[Code, int]:
    """Return the mapping of a file of --colors, which has lines `value: [red, green, blue]`.

    Several lines can have the same value: it has several colors.

    Raises:
        ValueError: the file cannot be read; a value or color is out of range; two values have one color.
    """
    try:
        root = read_root(file, f"--colors: {file}")
    except OSError as error:
        raise ValueError(f"--colors: {file} cannot be read: {error.strerror}") from None
    lines = root.value if isinstance(root, yaml.MappingNode) else []
    # Not a dict: two lines can have the same value.
    content = [[_plain(node) for node in line] for line in lines]
    if not content:
        raise ValueError(f"--colors: {file} has no lines `value: [red, green, blue]`")
    mapping: dict[Code, int] = {}
    for value, colors in content:
        if not _is_in(value, 256):
            raise ValueError(f"--colors: {file} has the mask value {short_repr(value)}: expected 0..255")
        several = isinstance(colors, list) and colors and isinstance(colors[0], list)
        for color in colors if several else [colors]:
            if not (isinstance(color, list) and len(color) == 3 and all(_is_in(part, 256) for part in color)):
                raise ValueError(
                    f"--colors: {file}, mask value {value}: expected [red, green, blue], 0..255 each, got "
                    f"{short_repr(color)}"
                )
            code = color[0] << 16 | color[1] << 8 | color[2]
            if mapping.setdefault(code, value) != value:
                raise ValueError(
                    f"--colors: {file} gives {color} to the mask values {mapping[code]} and {value}: "
                    "remove one"
                )
    return mapping


def _plain(node: yaml.Node) -> Any:
    """Return the value of a node: a list, an integer as YAML reads it, or else text."""
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item) for item in node.value]
    if node.tag == "tag:yaml.org,2002:int":
        return yaml.SafeLoader("").construct_yaml_int(node)
    return node.value


def read_values(pairs: Sequence[str]) -> dict[Code, int]:
    """Return the mapping of --values, pairs such as "255=1".

    Raises:
        ValueError: a pair is invalid or out of range, or a value is mapped twice.
    """
    mapping: dict[Code, int] = {}
    for pair in pairs:
        words = pair.split("=")
        numbers = [int(word) for word in words if word.isascii() and word.isdigit()]
        if len(words) != 2 or len(numbers) != 2 or numbers[0] >= 2**16 or numbers[1] > 255:
            raise ValueError(
                f"--values: expected VALUE=NEW, 0..65535 and 0..255, such as 255=1, got {pair!r}"
            )
        if mapping.setdefault(*numbers) != numbers[1]:
            raise ValueError(f"--values: {numbers[0]} is mapped twice: remove {pair}")
    return mapping


def _is_in(number: object, end: int) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and 0 <= number < end


def main() -> int:
    """Run the command and return its exit code."""
    parser = Parser(
        prog="python -m pipeline.convert_masks",
        description="Convert masks with colors (RGB, RGBA, palette), with the values 0 and 255, or with 16 "
        "bits to index masks: palette PNGs with 0 for background, k + 1 for class k and 255 for ignored "
        "pixels. Give one of --values, --colors and --palette.",
        epilog="The same command continues a stopped run. Exit code 0: all masks are converted; 1: some "
        "failed, all listed in failed.txt in --output; 2: wrong usage.",
    )
    flag = parser.add_argument
    flag("--input", required=True, metavar="DIR", help="folder of the masks, with subfolders")
    flag("--output", required=True, metavar="DIR", help="folder for the index masks, made if missing")
    group = parser.add_mutually_exclusive_group(required=True)
    choice = group.add_argument
    choice("--values", nargs="+", metavar="VALUE=NEW", help="new value of each gray value or palette index, "
           "such as 0=0 255=1; white of a 1-bit mask is 1 if 1 is listed, else 255")  # fmt: skip
    choice("--colors", metavar="FILE.yaml", help="lines `value: [red, green, blue]`, one for each value of "
           "the index masks, such as 1: [128, 0, 0]; for several colors, a list of them")  # fmt: skip
    choice("--palette", choices=["voc"], help="the colors of PASCAL VOC; index 1 is (128, 0, 0)")
    flag("--unknown", choices=["error", "ignore"], default="error", help="masks with colors or values that "
         "are not listed: error fails them, ignore makes these pixels 255")  # fmt: skip
    flag("--overwrite", action="store_true", help="remove the outputs of an earlier run first")
    flag("--num_workers", type=count, metavar="N", default=cores(), help="number of processes")
    args = parser.parse_args()
    source, target = Path(args.input).resolve(), Path(args.output).resolve()
    if source == target or source in target.parents or target in source.parents:
        parser.error(f"--output: {args.output} overlaps with --input {args.input}: give another folder")
    if args.values:
        mapping, given = read_values(args.values), "--values"
    elif args.colors:
        mapping, given = read_colors(args.colors), "--colors"
    else:
        colors = voc_palette().astype(int) @ (1 << 16, 1 << 8, 1)
        mapping, given = dict(zip(colors.tolist(), range(256), strict=True)), "--palette"
    files = mask_files(args.input)
    step = ConvertStep(files, args.output, mapping, given, not args.values, args.unknown == "ignore")
    settings = {
        "input": str(source),
        "mapping": {str(code): value for code, value in sorted(mapping.items())},
        "colors": step.colors,
        "unknown": args.unknown,
    }
    run = Run(args.output, Record("convert_masks", settings, outputs=("*.png",)), args.overwrite)
    parts = run.map(step, list(files), args.num_workers)
    code = run.finish()
    if run.rank == 0:
        step.log_unknown(parts)
    return code


if __name__ == "__main__":
    command(main)
