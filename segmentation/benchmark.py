"""A benchmark: the classes of a data set, their prompts, and the layout of its files.

Class indices are 0-based without background (`keys` in CAM files). Index masks hold 0 for background, k + 1
for class k and 255 for ignored pixels; without a background class they hold k.
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

IGNORE = 255  # index-mask value of ignored pixels: no loss and no score counts them
LABEL_SOURCES = ("voc_xml", "file", "masks", "coco_json")


@cache
def voc_palette() -> np.ndarray:
    """Return PASCAL VOC's palette, (256, 3) uint8, read-only: the bits of an index spread over R, G and B."""
    index = np.arange(256)
    palette = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= (((index >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    palette.flags.writeable = False  # the cache returns the same array to all callers
    return palette


@dataclass
class Benchmark:
    """Everything the pipeline needs to know about a data set; one YAML file describes a new one.

    Folders are relative to `root` unless absolute. `prompts` are the class names as the text tower
    reads them (empty: `classes`). `labels` says where image-level labels come from:
    "voc_xml" (`annotation_dir`), "file" (the split lines, `id idx idx ...`), "masks" (the values of
    `mask_dir`) or "coco_json" (`annotation_file`).

    Tagging, which predicts the labels, reads the plain `classes`, not `prompts`. `tag_backgrounds` are its
    background names (None: `backgrounds`), `tag_templates` its templates (empty: TagCLIP's).

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
    model: str = ""  # the default of --model; empty: none

    def __post_init__(self):
        self.prompts = list(self.prompts) or list(self.classes)
        if self.tag_backgrounds is None:
            self.tag_backgrounds = list(self.backgrounds)
        for fault in _faults(self):
            raise ValueError(f"benchmark {self.name}: {fault}")

    @property
    def channels(self) -> int:
        """Number of values of an index mask, 255 aside: the classes, and background if there is one."""
        return len(self.classes) + self.has_background

    @property
    def tag_names(self) -> list[str]:
        """Names that tagging distinguishes: the classes, then the backgrounds."""
        return [*self.classes, *self.tag_backgrounds]

    @property
    def palette(self) -> np.ndarray:
        """Colors of its masks, see `voc_palette`."""
        return voc_palette()

    def path(self, name: str) -> Path:
        """Return a file or folder of the data set, `root / name` unless `name` is absolute."""
        return Path(self.root) / name


def _faults(benchmark: Benchmark) -> Iterator[str]:
    """Yield what is wrong with the fields of a benchmark, in the words of an error."""
    classes, prompts = benchmark.classes, benchmark.prompts
    groups, group_names = benchmark.groups, benchmark.group_names
    if len(prompts) != len(classes):
        yield f"{len(classes)} classes but {len(prompts)} prompts"
    if not classes:
        yield "it names no classes"
    if twice := sorted({name for name in classes if classes.count(name) > 1}):
        yield f"it names these classes twice: {', '.join(twice)}"
    if benchmark.channels > IGNORE:
        yield f"an index mask holds {IGNORE} values, {benchmark.channels} needed"
    if len(set(group_names)) < len(group_names) or bool(groups) != bool(group_names):
        yield "groups and group_names go together, and no name is there twice"
    indices_fit = len(groups) == len(classes) and all(0 <= group < len(group_names) for group in groups)
    if groups and (benchmark.has_background or not indices_fit):
        yield "groups must hold an index into group_names for each class, and go without a background"
    for template in [*(benchmark.templates or [""]), *benchmark.tag_templates]:
        if not _takes_name(template):
            yield f"template {template!r} needs one {{}}, where the class name goes, and no other braces"
    if benchmark.category_ids and len(set(benchmark.category_ids)) != len(classes):
        yield "category_ids must hold one id for each class"
    if benchmark.labels not in LABEL_SOURCES:
        yield f"labels must be one of {', '.join(LABEL_SOURCES)}, got {benchmark.labels!r}"


def _takes_name(template: str) -> bool:
    try:
        return "name" in template.format("name")
    except (LookupError, ValueError, AttributeError):  # what str.format raises on fields it cannot fill
        return False


def load(name: str) -> Benchmark:
    """Return a benchmark by name or from a file.

    Args:
        name: a `.yaml` file with the fields of `Benchmark` (a relative `root` or `split_file` is relative to
            the file's folder), or a package of this project that defines BENCHMARK: voc12, coco14, cocostuff,
            shapes.

    Raises:
        ValueError: unknown name, unreadable file, unknown or wrongly typed field.
    """
    if name.endswith((".yaml", ".yml")):
        return _read_yaml(Path(name))
    module = importlib.import_module(name) if name.isidentifier() and find_spec(name) else None
    if not isinstance(getattr(module, "BENCHMARK", None), Benchmark):
        names = "voc12, coco14, cocostuff, shapes"
        raise ValueError(f"no benchmark {name!r}: give {names} or a .yaml file that describes yours")
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
