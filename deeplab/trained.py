"""A trained network in use: what names one on the command line, and how an image goes through it."""

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.files import sha256
from deeplab.checkpoint import load_full
from deeplab.config import CONFIG, Config, Test, read
from deeplab.data import benchmark_of
from deeplab.networks import NETWORKS, network_of
from pipeline.cams_cli import recorded
from pipeline.flags import factors
from pipeline.processes import device_of
from refinement.densecrf import PRESETS, densecrf_batch
from segmentation.benchmark import Benchmark
from segmentation.checkpoints import FINAL
from segmentation.inference import PRECISIONS, Protocol, combine, scale_logits
from segmentation.transforms import denormalised, imagenet_normalise

# WeakCLIP's fork of deeplabv1-resnet38 shows its CRF only the classes that win somewhere in the image.
WINNERS_ONLY = ("r38_voc", "r38_coco")


@dataclass(frozen=True)
class Setup:
    """A trained network and how it is used; pickled when there are several processes.

    Attributes:
        config: that it was trained with.
        benchmark: whose classes it predicts.
        checkpoint: file of its weights.
        protocol: scales, flips and how they are averaged.
        crf: a name in `refinement.densecrf.PRESETS`; None for no CRF.
        precision: a name in `segmentation.inference.PRECISIONS`.
        device: see `pipeline.processes.device_of`.
    """

    config: Config
    benchmark: Benchmark
    checkpoint: str
    protocol: Protocol
    crf: str | None = None
    precision: str = "fp32"
    device: str = "auto"


def record(setup: Setup) -> dict[str, dict[str, Any]]:
    """What a network's outputs depend on, but for the images and the CRF; as `pipeline.run.Run` takes it.

    Raises:
        OSError: the checkpoint cannot be read.
    """
    model = asdict(setup.config.model)
    del model["init"]  # the weights that the training started from
    settings = {
        "benchmark": recorded(setup.config.data.benchmark),
        "model": model,
        "protocol": asdict(setup.protocol),
        "precision": setup.precision,
    }
    return {"settings": settings, "inputs": {"checkpoint": sha256(setup.checkpoint)}}


class Segmented(NamedTuple):
    """What a network makes of an image.

    Attributes:
        probabilities: (C, H, W) float32 on the network's device.
        logits: (C, h, w) float32 as the network gives them for the unscaled image, None if the protocol has
            no scale 1. Network A's are an eighth of the image's size.
    """

    probabilities: Tensor
    logits: Tensor | None

    @property
    def labels(self) -> np.ndarray:
        """(H, W) uint8: the most probable class of each pixel."""
        return on_cpu(self.probabilities.argmax(0))


class Segmenter:
    """The network of a setup, loaded.

    Args:
        setup: see there.
        position: of this process on its machine, which GPU it takes.

    Raises:
        ValueError, OSError: the checkpoint cannot be read, or is of another network; or no such device.
    """

    def __init__(self, setup: Setup, position: int = 0):
        self.setup, self.network = setup, network_of(setup.config)
        self.device = torch.device(device_of(setup.device, position))
        if self.device.type == "cuda":  # PyTorch would have convolutions take TF32 for float32
            tf32 = setup.precision == "tf32"
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
        self.model = self.network.build(setup.config.model, setup.benchmark.channels)
        load_full(self.model, setup.checkpoint)
        layout = torch.channels_last if setup.config.run.channels_last else torch.contiguous_format
        self.model.eval().to(self.device, memory_format=layout)

    def __call__(self, image: np.ndarray) -> Segmented:
        """Segment an image (H, W, 3) uint8 RGB."""
        protocol, unscaled = self.setup.protocol, []

        def passes() -> Iterator[Tensor]:
            pixels = self.network.normalise(image)  # (3, H, W)
            found = scale_logits(self.model, pixels, protocol, self.device, self.setup.precision)
            for scale, logits in found:
                if scale == 1:
                    unscaled.append(logits[0])
                yield logits

        probabilities = combine(passes(), image.shape[:2], protocol)
        return Segmented(probabilities, unscaled[0] if unscaled else None)

    def crf_labels(self, image: np.ndarray, probabilities: Tensor) -> np.ndarray:
        """The labels after the setup's dense CRF, see `crf_labels`."""
        return crf_labels(image, probabilities, self.setup.crf)


def crf_labels(image: np.ndarray, probabilities: Tensor, preset: str) -> np.ndarray:
    """Labels of an image by a dense CRF.

    Args:
        image: (H, W, 3) uint8 RGB.
        probabilities: (C, H, W) float32, on the device where the CRF is to run.
        preset: a name in `refinement.densecrf.PRESETS`.

    Returns:
        (H, W) uint8.
    """
    keys = torch.arange(len(probabilities), device=probabilities.device)
    if preset in WINNERS_ONLY:
        keys = probabilities.argmax(0).unique()  # (K,)
        probabilities = probabilities[keys]
        probabilities = probabilities / probabilities.sum(0)  # as the softmax of their logits alone
    if preset == "seam":  # shows the CRF the network's input, brought back to 8 bits
        image = denormalised(imagenet_normalise(image))
    (posterior,) = densecrf_batch([image], [probabilities], PRESETS[preset])
    return on_cpu(keys[posterior.argmax(0)])


def on_cpu(labels: Tensor) -> np.ndarray:
    """Class indices as (H, W) uint8 array."""
    return labels.to(torch.uint8).cpu().numpy()


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that name a network and say how it is used."""
    flag = parser.add_argument_group("which network").add_argument
    flag("--run", "--run_dir", metavar="DIR", help=f"folder that deeplab.train filled: its {CONFIG} and "
         f"{FINAL} (torchrun mistakes --run for one of its own flags: give it --run_dir)")  # fmt: skip
    flag("--config", metavar="FILE", help="configuration, in place of the run's")
    flag("--checkpoint", metavar="FILE", help=f"weights, in place of the run's {FINAL}")
    flag("overrides", nargs="*", metavar="key=value", help="changes to the configuration")
    flag = parser.add_argument_group(
        "how it is used (without a flag: what the configuration's `test` says, and what that leaves open as "
        "published for the network)"
    ).add_argument
    flag("--scales", type=factors, metavar="S,S,...", help="multiples of the image's size whose results are "
         "averaged")  # fmt: skip
    flag("--flip", action="store_true", default=None, help="average with the mirrored image")
    flag("--no_flip", action="store_false", dest="flip", default=None, help="do not")
    flag("--crf", choices=["none", "auto", *PRESETS], help="dense CRF after the network; auto: "
         + ", ".join(f"{network.crf} for {name}" for name, network in NETWORKS.items()))  # fmt: skip
    flag("--precision", choices=PRECISIONS, default="fp32", help="of the network's products")
    flag("--device", default="auto", help="auto, cpu, cuda or cuda:i")


def protocol_of(config: Config) -> tuple[Protocol, str | None]:
    """How a configuration's network is tested: as its `test` says, and where that is silent as published.

    Returns:
        The protocol, and a name in `refinement.densecrf.PRESETS`; None for no CRF.

    Raises:
        ValueError: no such network or CRF, or scales that are none.
    """
    network, test = network_of(config), config.test
    crf = {"none": None, "auto": network.crf}.get(test.crf or "none", test.crf)
    if crf is not None and crf not in PRESETS:
        raise ValueError(f"test.crf must be none, auto or one of {', '.join(PRESETS)}, got {crf!r}")
    scales = network.protocol.scales if test.scales is None else tuple(test.scales)
    flip = network.protocol.flip if test.flip is None else test.flip
    return replace(network.protocol, scales=scales, flip=flip), crf


def read_setup(args: argparse.Namespace) -> Setup:
    """The network that the flags of `add_flags` name.

    Raises:
        ValueError, OSError: a file is missing or damaged, or what is needed is not given.
    """
    if not args.run and not (args.config and args.checkpoint):
        raise ValueError("give --run DIR, or --config FILE and --checkpoint FILE")
    if args.run and not Path(args.run).is_dir():
        raise FileNotFoundError(f"run folder {args.run} does not exist: train first, or give another --run")
    config = read(args.config or Path(args.run) / CONFIG, args.overrides)
    checkpoint = Path(args.checkpoint or Path(args.run) / FINAL)
    if not checkpoint.is_file():
        raise FileNotFoundError(
            f"checkpoint {checkpoint} does not exist: finish the training, or give --checkpoint FILE"
        )
    config.test = Test(
        scales=config.test.scales if args.scales is None else list(args.scales),
        flip=config.test.flip if args.flip is None else args.flip,
        crf=args.crf or config.test.crf,
    )
    protocol, crf = protocol_of(config)
    return Setup(
        config=config,
        benchmark=benchmark_of(config),
        checkpoint=str(checkpoint),
        protocol=protocol,
        crf=crf,
        precision=args.precision,
        device=args.device,
    )
