"""The configuration of a run: a YAML file and `key=value` words on the command line, typed and checked."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from segmentation.trainer import Running, Solver

# What OmegaConf raises on a configuration that is not as it should be; TypeError: a list for the whole.
WRONG = (OmegaConfBaseException, YAMLError, TypeError)
CONFIG = "config.yaml"  # of a run folder: the configuration it was trained with


@dataclass
class Data:
    """Which images, and whose masks. What is empty is the benchmark's own."""

    benchmark: str = "voc12"  # voc12, coco14, cocostuff, shapes or a .yaml file
    root: str = ""  # folder of the data set
    image_dir: str = ""
    label_dir: str = ""  # masks to train on: pseudo masks, or the ground truth
    train_split: str = ""  # image ids, one a line
    val_image_dir: str = ""  # empty: image_dir
    val_label_dir: str = ""  # ground truth to validate and test on; never that to train on
    val_split: str = ""  # empty: no validation while training


@dataclass
class Model:
    """Which network. The defaults are ResNet-101's; `blocks`, `width` and `rates` also make small ones."""

    network: str = "deeplab_v2"  # a name in deeplab.networks.NETWORKS
    blocks: list[int] = field(default_factory=list)  # of each stage; empty: as published
    width: int = 64  # channels of the first convolution
    rates: list[int] = field(default_factory=list)  # dilations of the head; empty: as published
    scales: list[float] = field(default_factory=lambda: [0.5, 0.75])  # deeplab_v2: what MSC adds to 1
    freeze_bn: bool | None = None  # null: as published
    stride_in: str | None = None  # deeplab_v2: reduce, conv3x3; null: as the initial weights want it
    init: str = ""  # checkpoint to start from; empty: random weights

    def __post_init__(self):
        for name, numbers in (("width", [self.width]), ("blocks", self.blocks), ("rates", self.rates)):
            if min(numbers, default=1) < 1:
                raise ValueError(f"model.{name} must be 1 or more, got {getattr(self, name)}")


@dataclass
class Augment:
    """How samples are drawn."""

    crop: int = 321
    scales: list[float] = field(default_factory=lambda: [0.5, 0.75, 1.0, 1.25, 1.5])  # deeplab_v2 picks one
    base: int | None = None  # deeplab_v2: the longer side that scale 1 stands for; null: the image's own
    flip: bool = True
    scale_range: list[float] = field(default_factory=lambda: [0.5, 1.5])  # deeplab_v1_r38 draws from it
    jitter: int = 10  # deeplab_v1_r38: of hue, saturation and value


@dataclass
class Test:
    """How the network is tested. What is null is the network's public protocol."""

    scales: list[float] | None = None
    flip: bool | None = None
    crf: str | None = None  # a preset of refinement.densecrf


@dataclass
class Config:
    """Everything about a run."""

    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    augment: Augment = field(default_factory=Augment)
    solver: Solver = field(default_factory=Solver)
    test: Test = field(default_factory=Test)
    run: Running = field(default_factory=Running)


def read(file: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """The defaults, changed by a YAML file, changed by words such as `solver.learning_rate=2e-4`.

    Raises:
        ValueError: no such file, an unknown key, or a value of the wrong type; the sentence names it.
    """
    config = OmegaConf.structured(Config)
    if file is not None:
        if not Path(file).is_file():
            raise ValueError(f"configuration {file} does not exist")
        try:
            config = OmegaConf.merge(config, OmegaConf.load(file))
        except (*WRONG, UnicodeDecodeError, OSError) as error:
            raise ValueError(f"configuration {file}: {_told(error)}") from None
    for word in overrides:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise ValueError(f"expected key=value, such as solver.learning_rate=2e-4, got {word!r}")
        try:  # nothing after the = is the empty string, not YAML's null
            config = OmegaConf.merge(config, OmegaConf.from_dotlist([word if value else f"{word}''"]))
        except WRONG as error:
            raise ValueError(f"{word}: {_told(error)}") from None
    try:
        return OmegaConf.to_object(config)
    except OmegaConfBaseException as error:  # a reference to nothing
        raise ValueError(f"the configuration: {_told(error)}") from None


def _told(error: Exception) -> str:
    """The first line of an error, and the key that OmegaConf tells in another."""
    first, key = str(error).splitlines()[0], getattr(error, "full_key", None)
    return f"{first} ({key})" if key and key not in first else first


def text(config: Config) -> str:
    """The whole configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))
