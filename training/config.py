"""The configuration of a run: a YAML file and `key=value` arguments, with checked types and ranges."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from foundation import yamlfile
from foundation.settings import Settings, setting
from refinement.densecrf import PRESETS
from segmentation.config import OptimConfig, RunConfig

CONFIG = "config.yaml"  # in the run folder: the configuration of the training
CRFS = ("none", "auto", *PRESETS)
MAX_REFERENCES = 10  # in one value
REFERENCE = re.compile(r"\$\{([^{}]*)\}")


@dataclass
class DataConfig(Settings):
    """Section `data`: images and masks. Empty values default to those of the benchmark."""

    SECTION = "data."

    benchmark: str = setting("voc12", "voc12, coco14, cocostuff, shapes or a .yaml file")
    root: str = setting("", "folder of the data set")
    image_dir: str = setting("", "folder of the images")
    label_dir: str = setting("", "folder of the masks to train on: pseudo masks, or the ground truth")
    train_split: str = setting("", "file of image ids, one per line")
    val_image_dir: str = setting("", "folder of the images for validation and test; empty: `image_dir`")
    val_label_dir: str = setting("", "folder of the ground truth for validation and test; empty: the "
                                 "benchmark's, never `label_dir`")  # fmt: skip
    val_split: str = setting("", "file of image ids for validation and test; empty: no validation during "
                             "training")


@dataclass
class ModelConfig(Settings):
    """Section `model`. Methods add the settings of their networks."""

    SECTION = "model."

    network: str = setting("", "name of a network of the method")
    init: str = setting("", "checkpoint to start from; empty: random weights")


@dataclass
class TestConfig(Settings):
    """Section `test`: how the network is tested.

    Null values of `scales` and `flip` default to the network's published protocol. A null `crf` means no CRF.
    """

    SECTION = "test."

    scales: list[float] | None = setting(None, "image scales whose predictions are averaged",
                                         above=0, metavar="S,S,...")  # fmt: skip
    flip: bool | None = setting(None, "average with the prediction for the mirrored image")
    crf: str | None = setting(None, "preset of a dense CRF after the network; none or null: no CRF; auto: "
                              "the network's own preset",
                              choices=CRFS)  # fmt: skip


@dataclass
class Config:
    """The configuration of a run. Methods define subclasses with further sections."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    solver: OptimConfig = field(default_factory=OptimConfig)
    test: TestConfig = field(default_factory=TestConfig)
    run: RunConfig = field(default_factory=RunConfig)


C = TypeVar("C", bound=Config)


def read(kind: type[C], file: str | Path | None, overrides: Sequence[str] = ()) -> C:
    """Return the configuration: the defaults of a class, replaced by a YAML file and then by overrides.

    `${data.root}` in a value stands for the value of another key.

    Args:
        kind: class of the configuration.
        file: YAML file; None reads none.
        overrides: arguments such as `solver.learning_rate=2e-4`.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file does not exist, a key is unknown, or a value has the wrong type or is outside its
            range.
    """
    entries: dict[str, yamlfile.Entry] = {}
    if file is not None:
        if not Path(file).is_file():
            raise ValueError(f"configuration {file} does not exist: give an existing YAML file")
        entries |= yamlfile.read(kind, file, "configuration", references=True)
    for word in overrides:
        entries |= yamlfile.read_word(kind, word, references=True)
    config, values = kind(), {key: entry.value for key, entry in entries.items()}
    known = {**_flat(asdict(config)), **values}
    for key, entry in entries.items():
        if isinstance(entry.value, str) and "${" in entry.value:
            hint, spec = yamlfile.schema(kind)[key]
            try:
                values[key] = yamlfile.parse(_replaced(entry.value, key, known), key, hint, spec)
            except ValueError as error:
                raise ValueError(f"{entry.where}: {error}") from None
    return _updated(config, values)


def _replaced(text: str, key: str, values: Mapping[str, Any]) -> str:
    """Return a text with the values of the keys that it refers to, such as `${data.root}`.

    A value is replaced once, so that no file can build long texts or endless loops.
    """

    def value(match: re.Match) -> str:
        other = values.get(match[1].strip())
        if not isinstance(other, str | int | float) or "${" in str(other):
            name = yamlfile.shown(match[1])
            raise ValueError(f"{key} refers to {name}, which is not a key with its own text or number")
        return str(other)

    if "${" in REFERENCE.sub("", text) or text.count("${") > MAX_REFERENCES:
        form = f"the form ${{data.root}}, at most {MAX_REFERENCES} times"
        raise ValueError(f"{key} must refer to keys in {form}, got {yamlfile.shown(text)}")
    return REFERENCE.sub(value, text)


def _flat(sections: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dicts as one: key such as "solver.seed" -> value."""
    result = {}
    for name, value in sections.items():
        result |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return result


def _updated(config: Any, values: Mapping[str, Any], prefix: str = "") -> Any:
    """Return a copy of a dataclass with the values of keys such as "solver.seed"."""
    changes = {}
    for declared in fields(config):
        value, key = getattr(config, declared.name), prefix + declared.name
        if is_dataclass(value):
            changes[declared.name] = _updated(value, values, f"{key}.")
        elif key in values:
            changes[declared.name] = values[key]
    return replace(config, **changes)


def to_yaml(config: Config) -> str:
    """Return the whole configuration as YAML, which `read` reads as an equal configuration."""
    options = {"default_flow_style": False, "allow_unicode": True, "sort_keys": False}
    return yaml.dump(asdict(config), Dumper=_Dumper, **options)


class _Dumper(yaml.SafeDumper):
    """Dumper that escapes special characters and line breaks; PyYAML's other styles change some of them."""


def _text(dumper: _Dumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _text)
