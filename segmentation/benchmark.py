"""A benchmark: the classes of a data set, their prompts, and the layout of its files.

Class indices are 0-based without background (`keys` in CAM files). The values of index masks are 0 for
background, k + 1 for class k and 255 for ignored pixels. In a benchmark without background class, the value
of class k is k.
"""

import importlib
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from foundation import yamlfile
from foundation.settings import setting
from foundation.yamlfile import label, shown

IGNORE = 255  # index-mask value of ignored pixels, which losses and scores do not count
LABEL_SOURCES = ("voc_xml", "file", "masks", "coco_json")
NAMES = ("classes", "prompts", "backgrounds", "tag_backgrounds", "group_names")  # lists of distinct names


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
    templates: list[str] = setting(
        ["a clean origami {}."], "texts with one {} for the class name", items="texts with one {}"
    )
    tag_backgrounds: list[str] | None = None
    tag_templates: list[str] = setting([], "the same for tagging", items="texts with one {}")
    box_threshold: float = setting(
        0.4, "lambda of the class box mask, relative to the CAM's maximum", least=0, most=1
    )
    has_background: bool = True
    groups: list[int] = field(default_factory=list)
    group_names: list[str] = field(default_factory=list)
    labels: str = setting("file", "source of image-level labels", choices=LABEL_SOURCES)
    root: str = "."
    image_dir: str = "JPEGImages"
    mask_dir: str = "SegmentationClass"
    annotation_dir: str = "Annotations"
    annotation_file: str = ""
    category_ids: list[int] = field(default_factory=list)  # one per class; empty: matched by name
    split_file: str = ""  # default of --split_file
    model: str = ""  # default of --model; empty: no default

    def __post_init__(self):
        for field_name, item, fault in _name_faults(self):
            raise InvalidField(f"benchmark {label(str(self.name))}: {fault}", field_name, item)
        self.prompts = list(self.prompts) or list(self.classes)
        if self.tag_backgrounds is None:
            self.tag_backgrounds = list(self.backgrounds)
        for field_name, fault in _faults(self):
            raise InvalidField(f"benchmark {label(self.name)}: {fault}", field_name)

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


class InvalidField(ValueError):
    """A field of a benchmark is invalid; `item` is the index of the invalid item of a list, or None."""

    def __init__(self, message: str, field_name: str, item: int | None = None):
        super().__init__(message)
        self.field_name, self.item = field_name, item


def _name_faults(benchmark: Benchmark) -> Iterator[tuple[str, int | None, str]]:
    """Yield field, index of the item (None: the whole field) and an error message for each invalid name."""
    if not isinstance(benchmark.name, str) or not benchmark.name.strip():
        yield "name", None, "the name is empty: give the data set a name"
    elif _has_control(benchmark.name):
        yield "name", None, "the name has a line break or control character: remove it"
    for field_name in NAMES:
        names, known = getattr(benchmark, field_name), set()
        if names is None and field_name == "tag_backgrounds":
            continue
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            yield field_name, None, f"{field_name} must be a list of names, got {names!r}"
            continue
        for index, name in enumerate(names):
            words = " ".join(name.split())
            if not words:
                yield field_name, index, f"name {index + 1} of {field_name} is empty: write or remove it"
            if _has_control(name):
                fault = f"the name {shown(name)} has a line break or control character: remove it"
                yield field_name, index, f"{field_name}: {fault}"
            if words in known:
                fault = f"{field_name} contains these names more than once: {label(words)}"
                yield field_name, index, f"{fault} (blanks are not compared); remove one"
            known.add(words)


def _has_control(name: str) -> bool:
    """Return whether a name has line breaks, control characters or halves of a surrogate pair."""
    return any(unicodedata.category(character) in ("Cc", "Cs") for character in name)


def _faults(benchmark: Benchmark) -> Iterator[tuple[str, str]]:
    """Yield field and error message for each invalid field of a benchmark with valid names."""
    classes, prompts = benchmark.classes, benchmark.prompts
    groups, group_names = benchmark.groups, benchmark.group_names
    if len(prompts) != len(classes):
        fault = f"{len(classes)} classes but {len(prompts)} prompts: give one prompt for each class, or none"
        yield "prompts", fault
    if not classes:
        yield "classes", "classes is empty: give at least one class name"
    if benchmark.channels > IGNORE:
        fault = f"an index mask can store {IGNORE} values, {benchmark.channels} are needed"
        yield "classes", f"{fault}: give fewer classes"
    if bool(groups) != bool(group_names):
        yield "groups", "groups and group_names must be given together"
    indices_fit = len(groups) == len(classes) and all(0 <= group < len(group_names) for group in groups)
    if groups and (benchmark.has_background or not indices_fit):
        fault = "groups must contain an index into group_names for each class"
        yield "groups", f"{fault}, and has_background must be false"
    for field_name in ("templates", "tag_templates"):
        for template in getattr(benchmark, field_name) or ([""] if field_name == "templates" else []):
            if not _takes_name(template):
                fault = "must contain one {} for the class name, and no other braces"
                yield field_name, f"template {shown(template)} {fault}"
    if benchmark.category_ids and len(set(benchmark.category_ids)) != len(classes):
        fault = f"category_ids must contain one distinct id for each of the {len(classes)} classes"
        yield "category_ids", fault
    if benchmark.labels not in LABEL_SOURCES:
        yield "labels", f"labels must be one of {', '.join(LABEL_SOURCES)}, got {benchmark.labels!r}"


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
        raise ValueError(f"benchmark file {file} does not exist: give an existing YAML file")
    entries = yamlfile.read(Benchmark, file, "benchmark file")
    for name in ("name", "classes"):
        if name not in entries:
            raise ValueError(f"benchmark file {file}: the field {name} is missing: add it")
    try:
        benchmark = Benchmark(**{name: entry.value for name, entry in entries.items()})
    except InvalidField as error:
        entry = entries.get(error.field_name)
        where = f"benchmark file {file}"
        if entry is not None:
            where = entry.items[error.item] if entry.items and error.item is not None else entry.where
        raise ValueError(f"{where}: {error}") from None
    benchmark.root = str(file.parent / benchmark.root)
    if benchmark.split_file:
        benchmark.split_file = str(file.parent / benchmark.split_file)
    return benchmark
