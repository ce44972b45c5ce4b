"""A trained network: the flags that select it, and how it segments an image."""

import argparse
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foundation.files import sha256
from foundation.settings import add_flags, given
from pipeline.compute import warn_of_slow_precision
from pipeline.flags import recorded_path
from pipeline.processes import device_of
from refinement.densecrf import PRESETS, densecrf_batch
from segmentation.checkpoints import FINAL
from segmentation.inference import PRECISIONS, Protocol, Segmented, infer
from segmentation.transforms import imagenet_denormalize, imagenet_normalize
from training.config import CONFIG, Config, TestConfig, read
from training.data import benchmark_of
from training.recipe import Recipe

# In WeakCLIP's fork of deeplabv1-resnet38 the CRF uses only classes that are predicted at some pixel.
PREDICTED_ONLY = ("r38_voc", "r38_coco")


@dataclass
class Setup:
    """A trained network and how it is tested.

    The configuration determines the attributes `benchmark`, `protocol` and `crf` (a name in
    `refinement.densecrf.PRESETS`, or None).

    Args:
        recipe: the method.
        config: configuration of the training.
        checkpoint: file of the weights.
        precision: a name in `segmentation.inference.PRECISIONS`.
        device: see `pipeline.processes.device_of`.

    Raises:
        FileNotFoundError, ValueError: no such checkpoint, benchmark or network, or an invalid setting.
    """

    recipe: Recipe
    config: Config
    checkpoint: str
    precision: str = "fp32"
    device: str = "auto"

    def __post_init__(self):
        if not Path(self.checkpoint).is_file():
            raise FileNotFoundError(
                f"checkpoint {self.checkpoint} does not exist: finish the training, or give --checkpoint"
            )
        self.benchmark = benchmark_of(self.config)
        self.protocol, self.crf = protocol_of(self.recipe, self.config)

    def record(self) -> tuple[dict[str, Any], dict[str, str]]:
        """Return `settings` and `inputs` for the record of a run. Images and CRF are not included.

        Raises:
            OSError: a file of weights cannot be read.
        """
        model = asdict(self.config.model)
        del model["init"]  # the initial weights of the training do not affect a trained network
        protocol = {key: value for key, value in asdict(self.protocol).items() if value is not None}
        settings = {
            "benchmark": recorded_path(self.config.data.benchmark),
            "model": model,
            "protocol": protocol,
            "precision": self.precision,
        }
        files = {"checkpoint": self.checkpoint, **self.recipe.frozen_files(self.config)}
        return settings, {name: sha256(file) for name, file in files.items()}


class Segmenter:
    """The loaded network of a setup.

    Args:
        setup: the network and how it is tested.
        worker_index: number of the process; it selects the GPU.

    Raises:
        ValueError, OSError: the checkpoint cannot be read or belongs to another network, or there is no such
            device.
    """

    def __init__(self, setup: Setup, worker_index: int = 0):
        self.setup, self.network = setup, setup.recipe.network(setup.config)
        self.device = torch.device(device_of(setup.device, worker_index))
        if worker_index == 0:
            warn_of_slow_precision(self.device.type, setup.precision)
        if self.device.type == "cuda":  # PyTorch's convolutions use TF32 for float32 by default
            tf32 = setup.precision == "tf32"
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
        self.model = self.network.build(setup.config, setup.benchmark)
        setup.recipe.load_trained(self.model, setup.checkpoint)
        layout = torch.channels_last if setup.config.run.channels_last else torch.contiguous_format
        self.model.eval().to(self.device, memory_format=layout)

    def __call__(self, image: np.ndarray) -> Segmented:
        """Return the segmentation of an image (H, W, 3) uint8 RGB."""
        pixels = self.network.normalize(image)  # (3, H, W)
        return infer(self.model, pixels, self.setup.protocol, self.device, self.setup.precision)

    def labels(self, image: np.ndarray, segmented: Segmented) -> np.ndarray:
        """Return the labels (H, W) uint8 of a segmented image; after the dense CRF if the setup has one."""
        if self.setup.crf is None:
            return segmented.labels
        return crf_labels(image, segmented.probabilities, self.setup.crf)


def crf_labels(image: np.ndarray, probabilities: Tensor, preset: str) -> np.ndarray:
    """Return the labels (H, W) uint8 of an image after a dense CRF.

    Args:
        image: (H, W, 3) uint8 RGB.
        probabilities: (C, H, W) float32, on the device where the CRF runs.
        preset: a name in `refinement.densecrf.PRESETS`.
    """
    class_ids = torch.arange(len(probabilities), device=probabilities.device)
    if preset in PREDICTED_ONLY:
        class_ids = probabilities.argmax(0).unique()  # (K,)
        probabilities = probabilities[class_ids]
        probabilities = probabilities / probabilities.sum(0)  # equals the softmax of these classes' logits
    if preset == "seam":  # SEAM's CRF gets the network's input, converted back to 8 bits
        image = imagenet_denormalize(imagenet_normalize(image))
    (posterior,) = densecrf_batch([image], [probabilities], PRESETS[preset])
    return class_ids[posterior.argmax(0)].to(torch.uint8).cpu().numpy()


def add_network_flags(parser: argparse.ArgumentParser, recipe: Recipe) -> None:
    """Add the flags that select a network and its test protocol."""
    flag = parser.add_argument_group("which network").add_argument
    flag("--run", "--run_dir", metavar="DIR", help=f"run folder of {recipe.name}.train, with {CONFIG} and "
         f"{FINAL} (with torchrun use --run_dir, because --run is a flag of torchrun)")  # fmt: skip
    flag("--config", metavar="FILE", help="YAML configuration to use instead of the run's")
    flag("--checkpoint", metavar="FILE", help=f"weights to use instead of the run's {FINAL}")
    flag("overrides", nargs="*", metavar="key=value", help="changes to the configuration")
    group = parser.add_argument_group(
        "how the network is tested (default: the configuration's `test` section; if scales or flip are null "
        "there, the network's published protocol)"
    )
    add_flags(group, TestConfig)
    group.add_argument("--precision", choices=PRECISIONS, default="fp32", help="number type of the network's "
                       "matrix products")  # fmt: skip
    group.add_argument("--device", default="auto", help="device: auto, cpu, cuda or cuda:i")


def protocol_of(recipe: Recipe, config: Config) -> tuple[Protocol, str | None]:
    """Return how a network is tested, from the configuration's `test` section.

    Null values of `scales` and `flip` default to the network's published protocol.

    Returns:
        The protocol, and the name of a preset in `refinement.densecrf.PRESETS` (None: no CRF).

    Raises:
        ValueError: the network is unknown, or the list of scales is empty.
    """
    network, test = recipe.network(config), config.test
    crf = {"none": None, "auto": network.crf}.get(test.crf or "none", test.crf)
    scales = network.protocol.scales if test.scales is None else tuple(test.scales)
    flip = network.protocol.flip if test.flip is None else test.flip
    return replace(network.protocol, scales=scales, flip=flip), crf


def read_setup(recipe: Recipe, args: argparse.Namespace) -> Setup:
    """Return the setup that the flags of `add_network_flags` describe.

    Raises:
        ValueError, OSError: a file is missing or damaged, or a required flag is missing.
    """
    if not args.run and not (args.config and args.checkpoint):
        raise ValueError("no network is given: give --run DIR, or --config FILE and --checkpoint FILE")
    if args.run and not Path(args.run).is_dir():
        raise FileNotFoundError(f"run folder {args.run} does not exist: train first, or give another --run")
    config = read(recipe.config, args.config or Path(args.run) / CONFIG, args.overrides)
    config.test = replace(config.test, **given(TestConfig, args))
    checkpoint = args.checkpoint or str(Path(args.run) / FINAL)
    return Setup(recipe, config, checkpoint, args.precision, args.device)
