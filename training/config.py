"""The configuration of a run: a YAML file and `key=value` arguments, with checked types and ranges."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from common.settings import Settings, setting
from refinement.densecrf import PRESETS
from segmentation.config import OptimConfig, RunConfig

# Errors of OmegaConf for an invalid configuration; TypeError if the file contains a list.
INVALID = (OmegaConfBaseException, YAMLError, TypeError)
CONFIG = "config.yaml"  # in the run folder: the configuration of the training
CRFS = ("none", "auto", *PRESETS)


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

    Args:
        kind: class of the configuration.
        file: YAML file; None reads none.
        overrides: arguments such as `solver.learning_rate=2e-4`.

    Raises:
        ValueError: the file does not exist, a key is unknown, or a value has the wrong type or is outside its
            range.
    """
    config = OmegaConf.structured(kind)
    if file is not None:
        if not Path(file).is_file():
            raise ValueError(f"configuration {file} does not exist: give an existing YAML file")
        try:
            config = OmegaConf.merge(config, OmegaConf.load(file))
        except (*INVALID, UnicodeDecodeError, OSError) as error:
            raise ValueError(f"configuration {file}: {_message(error)}") from None
    for word in overrides:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise ValueError(f"expected key=value, such as solver.learning_rate=2e-4, got {word!r}")
        try:  # `key=` sets the empty string; YAML would read null
            config = OmegaConf.merge(config, OmegaConf.from_dotlist([word if value else f"{word}''"]))
        except INVALID as error:
            raise ValueError(f"{word}: {_message(error)}") from None
    try:
        return OmegaConf.to_object(config)
    except OmegaConfBaseException as error:  # such as an interpolation of an unknown key
        raise ValueError(f"invalid configuration: {_message(error)}") from None


def _message(error: Exception) -> str:
    """Return the first line of an error and its key, which OmegaConf stores in an attribute."""
    first, key = str(error).splitlines()[0], getattr(error, "full_key", None)
    return f"{first} ({key})" if key and key not in first else first


def to_yaml(config: Config) -> str:
    """Return the whole configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))
