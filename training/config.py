"""The configuration of a run: a YAML file and `key=value` words on the command line, typed and checked."""

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

# What OmegaConf raises on an invalid configuration; TypeError if the whole is a list.
INVALID = (OmegaConfBaseException, YAMLError, TypeError)
CONFIG = "config.yaml"  # of a run folder: the configuration it was trained with
CRFS = ("none", "auto", *PRESETS)


@dataclass
class DataConfig(Settings):
    """Section `data`: images and masks. Empty values are the benchmark's."""

    SECTION = "data."

    benchmark: str = setting("voc12", "voc12, coco14, cocostuff, shapes or a .yaml file")
    root: str = setting("", "folder of the data set")
    image_dir: str = setting("", "folder of the images")
    label_dir: str = setting("", "folder of the masks to train on: pseudo masks, or the ground truth")
    train_split: str = setting("", "file of image ids, one a line")
    val_image_dir: str = setting("", "images to validate and test on; empty: `image_dir`")
    val_label_dir: str = setting("", "ground truth to validate and test on; empty: the benchmark's, never "
                                 "`label_dir`")  # fmt: skip
    val_split: str = setting("", "file of image ids; empty: no validation during training")


@dataclass
class ModelConfig(Settings):
    """Section `model`. Methods add what their networks need."""

    SECTION = "model."

    network: str = setting("", "which of the method's networks")
    init: str = setting("", "checkpoint to start from; empty: random weights")


@dataclass
class TestConfig(Settings):
    """Section `test`: how the network is tested. Null values are the network's published protocol."""

    SECTION = "test."

    scales: list[float] | None = setting(None, "multiples of the image's size whose results are averaged",
                                         above=0, metavar="S,S,...")  # fmt: skip
    flip: bool | None = setting(None, "average with the mirrored image")
    crf: str | None = setting(None, "dense CRF after the network; auto is the network's preset", choices=CRFS)


@dataclass
class Config:
    """The configuration of a run. Methods have subclasses with further sections."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    solver: OptimConfig = field(default_factory=OptimConfig)
    test: TestConfig = field(default_factory=TestConfig)
    run: RunConfig = field(default_factory=RunConfig)


C = TypeVar("C", bound=Config)


def read(kind: type[C], file: str | Path | None, overrides: Sequence[str] = ()) -> C:
    """Return the defaults of a configuration class, changed by a YAML file and then by words such as
    `solver.learning_rate=2e-4`.

    Raises:
        ValueError: no such file, an unknown key, or a value of the wrong type or outside its range; the
            message names it.
    """
    config = OmegaConf.structured(kind)
    if file is not None:
        if not Path(file).is_file():
            raise ValueError(f"configuration {file} does not exist")
        try:
            config = OmegaConf.merge(config, OmegaConf.load(file))
        except (*INVALID, UnicodeDecodeError, OSError) as error:
            raise ValueError(f"configuration {file}: {_message(error)}") from None
    for word in overrides:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise ValueError(f"expected key=value, such as solver.learning_rate=2e-4, got {word!r}")
        try:  # nothing after the = is the empty string, not YAML's null
            config = OmegaConf.merge(config, OmegaConf.from_dotlist([word if value else f"{word}''"]))
        except INVALID as error:
            raise ValueError(f"{word}: {_message(error)}") from None
    try:
        return OmegaConf.to_object(config)
    except OmegaConfBaseException as error:  # such as an interpolation of an unknown key
        raise ValueError(f"the configuration: {_message(error)}") from None


def _message(error: Exception) -> str:
    """Return the first line of an error, with the key, which OmegaConf keeps apart."""
    first, key = str(error).splitlines()[0], getattr(error, "full_key", None)
    return f"{first} ({key})" if key and key not in first else first


def to_yaml(config: Config) -> str:
    """Return the whole configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))
