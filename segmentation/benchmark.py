"""A benchmark: the classes of a data set, how they are prompted, and how its files are laid out.

Class indices are 0-based without background (`keys` in CAM files). Index masks hold 0 for
background, k + 1 for class k and 255 for "unsure"; without a background class they hold k.
"""
import importlib
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

IGNORE = 255  # index-mask value of pixels that no loss and no score may count
LABEL_SOURCES = ("voc_xml", "file", "masks", "coco_json")


@cache
def voc_palette(colours: int = 256) -> np.ndarray:
    """The colours PASCAL VOC paints index masks with: the bits of an index, spread over R, G and B.

    Returns:
        (colours, 3) uint8, read-only.
    """
    index = np.arange(colours)
    palette = np.zeros((colours, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= (((index >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    palette.flags.writeable = False  # one array for all who ask
    return palette


@dataclass
class Benchmark:
    """Everything the pipeline needs to know of a data set; one YAML file describes a new one.

    Folders are relative to `root` unless absolute. `prompts` are the class names as the text tower
    reads them (empty: `classes` serve). `labels` says where image-level labels come from:
    "voc_xml" (`annotation_dir`), "file" (the split lines, `id idx idx ...`), "masks" (the values of
    `mask_dir`) or "coco_json" (`annotation_file`).

    Tagging, which finds the labels, reads the plain `classes`, not `prompts`. `tag_backgrounds` are its
    background names (None: `backgrounds`), `tag_templates` its templates (empty: those TagCLIP publishes).

    `groups` are classes that are scored as one: an index into `group_names` for each class.
    """

    name: str
    classes: list[str]
    prompts: list[str] = field(default_factory=list)
    backgrounds: list[str] = field(default_factory=list)
    templates: list[str] = field(default_factory=lambda: ["a clean origami {}."])
    tag_backgrounds: list[str] | None = None
    tag_templates: list[str] = field(default_factory=list)
    box_threshold: float = 0.4  # lambda of the class box mask, relative to the CAM's maximum
    has_background: bool = True
    groups: list[int] = field(default_factory=list)
    group_names: list[str] = field(default_factory=list)
    labels: str = "file"
    root: str = "."
    image_dir: str = "JPEGImages"
    mask_dir: str = "SegmentationClass"
    annotation_dir: str = "Annotations"
    annotation_file: str = ""
    category_ids: list[int] = field(default_factory=list)  # of each class in annotation_file; empty: rank
    split_file: str = ""  # the default of --split_file
    model: str = ""  # the default of --model; empty: the user says which

    def __post_init__(self):
        self.prompts = list(self.prompts) or list(self.classes)
        if self.tag_backgrounds is None:
            self.tag_backgrounds = list(self.backgrounds)
        if len(self.prompts) != len(self.classes):
            raise ValueError(
                f"benchmark {self.name}: {len(self.classes)} classes but {len(self.prompts)} prompts"
            )
        if not self.classes:
            raise ValueError(f"benchmark {self.name} names no classes")
        twice = sorted({name for name in self.classes if self.classes.count(name) > 1})
        if twice:
            raise ValueError(f"benchmark {self.name} names these classes twice: {', '.join(twice)}")
        if self.channels > IGNORE:
            raise ValueError(
                f"benchmark {self.name}: an index mask holds {IGNORE} values, {self.channels} needed"
            )
        if len(set(self.group_names)) < len(self.group_names) or bool(self.groups) != bool(self.group_names):
            raise ValueError(
                f"benchmark {self.name}: groups and group_names go together, and no name is there twice"
            )
        if self.groups and (
            len(self.groups) != len(self.classes)
            or not all(0 <= group < len(self.group_names) for group in self.groups)
            or self.has_background
        ):
            raise ValueError(
                f"benchmark {self.name}: groups must hold an index into group_names for each class, and go "
                "without a background"
            )
        for template in [*(self.templates or [""]), *self.tag_templates]:
            if not _takes_name(template):
                raise ValueError(
                    f"benchmark {self.name}: template {template!r} needs one {{}}, "
                    "where the class name goes, and no other braces"
                )
        if self.category_ids and len(set(self.category_ids)) != len(self.classes):
            raise ValueError(f"benchmark {self.name}: category_ids must hold one id for each class")
        if self.labels not in LABEL_SOURCES:
            known = ", ".join(LABEL_SOURCES)
            raise ValueError(f"benchmark {self.name}: labels must be one of {known}, got {self.labels!r}")

    @property
    def channels(self) -> int:
        """Values a clean index mask can hold: the classes, and background where there is one."""
        return len(self.classes) + self.has_background

    @property
    def tag_names(self) -> list[str]:
        """The names that tagging tells apart: the classes, then the backgrounds."""
        return [*self.classes, *self.tag_backgrounds]

    @property
    def palette(self) -> np.ndarray:
        """(256, 3) uint8; index 255 is the near-white of VOC's void."""
        return voc_palette()

    def path(self, name: str) -> Path:
        """A file or folder of the data set, `root / name` unless `name` is absolute."""
        return Path(self.root) / name


def _takes_name(template: str) -> bool:
    try:
        return "name" in template.format("name")
    except (LookupError, ValueError, AttributeError):  # what str.format raises on fields it cannot fill
        return False


def load(name: str) -> Benchmark:
    """A benchmark by name or by file.

    Args:
        name: a `.yaml` file with the fields of `Benchmark` (a relative `root` or `split_file` counts
            from the file's folder), or a package of this project that defines BENCHMARK: voc12,
            coco14, cocostuff, shapes.

    Raises:
        ValueError: unknown name, unreadable file, unknown or wrongly typed field.
    """
    if name.endswith((".yaml", ".yml")):
        return _read_yaml(Path(name))
    module = importlib.import_module(name) if name.isidentifier() and find_spec(name) else None
    if not isinstance(getattr(module, "BENCHMARK", None), Benchmark):
        raise ValueError(
            f"no benchmark {name!r}: give voc12, coco14, cocostuff, shapes or a .yaml file that "
            "describes yours"
        )
    return module.BENCHMARK


def _read_yaml(file: Path) -> Benchmark:
    if not file.is_file():
        raise ValueError(f"benchmark file {file} does not exist")
    try:
        config = OmegaConf.merge(OmegaConf.structured(Benchmark), OmegaConf.load(file))
        benchmark = OmegaConf.to_object(config)
    except (OmegaConfBaseException, YAMLError, TypeError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"benchmark file {file}: {str(error).splitlines()[0]}") from None
    benchmark.root = str(file.parent / benchmark.root)
    if benchmark.split_file:
        benchmark.split_file = str(file.parent / benchmark.split_file)
    return benchmark
