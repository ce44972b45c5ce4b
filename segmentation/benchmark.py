"""A benchmark: the classes of a data set, their prompts, and the layout of its files.

Class indices are 0-based without background (`keys` in CAM files). The values of index masks are 0 for
background, k + 1 for class k and 255 for ignored pixels. In a benchmark without background class, the value
of class k is k.
"""
import importlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

IGNORE = 255  # index-mask value of ignored pixels, which losses and scores do not count
LABEL_SOURCES = ("voc_xml", "file", "masks", "coco_json")


@cache
def voc_palette() -> np.ndarray:
    """Return PASCAL VOC's palette, (256, 3) uint8, read-only; the bits of an index determine R, G and B."""
    index, channel = np.ogrid[:256, :3]
    palette = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        palette |= (((index >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    palette.flags.writeable = False  # the cache returns the same array to all callers
    return palette


@dataclass
class Benchmark:
    """Description of a data set: classes, prompts and files. A YAML file with these fields adds a data set.

    Folder paths are relative to `root`, or absolute. `prompts` are the class names for the text tower (empty:
    `classes`). `labels` is the source of image-level labels: "voc_xml" (XML files in `annotation_dir`),
    "file" (lines `name index index ...` of the split file), "masks" (values of the masks in `mask_dir`) or
    "coco_json" (`annotation_file`).

    Tagging, which predicts the labels, uses `classes` instead of `prompts`, the background names
    `tag_backgrounds` (None: `backgrounds`) and the templates `tag_templates` (empty: TagCLIP's).

    `groups` merges classes for scoring: for each class, an index into `group_names`.
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
    category_ids: list[int] = field(default_factory=list)  # one per class; empty: matched by name
    split_file: str = ""  # default of --split_file
    model: str = ""  # default of --model; empty: no default

    def __post_init__(self):
        self.prompts = list(self.prompts) or list(self.classes)
        if self.tag_backgrounds is None:
            self.tag_backgrounds = list(self.backgrounds)
        for fault in _faults(self):
            raise ValueError(f"benchmark {self.name}: {fault}")

    @property
    def channels(self) -> int:
        """Number of values of an index mask without 255: the classes, plus background if there is one."""
        return len(self.classes) + self.has_background

    @property
    def tag_names(self) -> list[str]:
        """Names that tagging scores: the classes, then the background names."""
        return [*self.classes, *self.tag_backgrounds]

    @property
    def palette(self) -> np.ndarray:
        """Colors of the masks, see `voc_palette`."""
        return voc_palette()

    def path(self, name: str) -> Path:
        """Return the path of a file or folder of the data set: `root / name`, or `name` if it is absolute."""
        return Path(self.root) / name


def _faults(benchmark: Benchmark) -> Iterator[str]:
    """Yield an error message for each invalid field of a benchmark."""
    classes, prompts = benchmark.classes, benchmark.prompts
    groups, group_names = benchmark.groups, benchmark.group_names
    if len(prompts) != len(classes):
        yield f"{len(classes)} classes but {len(prompts)} prompts: give one prompt for each class, or none"
    if not classes:
        yield "classes is empty: give at least one class name"
    if duplicates := sorted({name for name in classes if classes.count(name) > 1}):
        yield f"classes contains these names more than once: {', '.join(duplicates)}"
    if benchmark.channels > IGNORE:
        yield f"an index mask can store {IGNORE} values, {benchmark.channels} are needed: give fewer classes"
    if len(set(group_names)) < len(group_names) or bool(groups) != bool(group_names):
        yield "groups and group_names must be given together, and group_names must not contain duplicates"
    indices_fit = len(groups) == len(classes) and all(0 <= group < len(group_names) for group in groups)
    if groups and (benchmark.has_background or not indices_fit):
        yield "groups must contain an index into group_names for each class, and has_background must be false"
    for template in [*(benchmark.templates or [""]), *benchmark.tag_templates]:
        if not _takes_name(template):
            yield f"template {template!r} must contain one {{}} for the class name, and no other braces"
    if benchmark.category_ids and len(set(benchmark.category_ids)) != len(classes):
        yield f"category_ids must contain one distinct id for each of the {len(classes)} classes"
    if benchmark.labels not in LABEL_SOURCES:
        yield f"labels must be one of {', '.join(LABEL_SOURCES)}, got {benchmark.labels!r}"


def _takes_name(template: str) -> bool:
    try:
        return "name" in template.format("name")
    except (LookupError, ValueError, AttributeError):  # raised by str.format for other or invalid fields
        return False


def load(name: str) -> Benchmark:
    """Return a benchmark by name, or from a YAML file.

    Args:
        name: a `.yaml` file with the fields of `Benchmark` (a relative `root` or `split_file` is relative to
            the file's folder), or a package of this project that defines BENCHMARK: voc12, coco14, cocostuff,
            shapes.

    Raises:
        ValueError: the name is unknown, the file cannot be read, or a field is unknown or invalid.
    """
    if name.endswith((".yaml", ".yml")):
        return _read_yaml(Path(name))
    module = importlib.import_module(name) if name.isidentifier() and find_spec(name) else None
    if not isinstance(getattr(module, "BENCHMARK", None), Benchmark):
        names = "voc12, coco14, cocostuff, shapes"
        raise ValueError(f"no benchmark {name!r}: give {names} or a .yaml file that describes your data")
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
