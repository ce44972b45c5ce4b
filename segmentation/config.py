"""Settings of the trainer: two sections of a training configuration."""

from dataclasses import dataclass

from foundation.settings import Settings, setting
from segmentation.inference import PRECISIONS


@dataclass
class OptimConfig(Settings):
    """Section `solver`: settings that determine the trained weights.

    Methods add settings of their optimizer, schedule and losses. The defaults are deeplab-pytorch's (VOC12).
    """

    SECTION = "solver."

    iterations: int = setting(20_000, "number of iterations (optimizer steps)", least=1)
    batch_size: int = setting(5, "images per batch, over all processes together", least=1)
    accumulate: int = setting(2, "batches per iteration, whose gradients are accumulated", least=1)
    drop_last: bool = setting(False, "skip the last batch of an epoch if it is incomplete, as SEAM does; "
                              "off: train on it as a smaller batch")  # fmt: skip
    learning_rate: float = setting(2.5e-4, "base learning rate, for parameter groups with factor 1", least=0)
    weight_decay: float = setting(5e-4, "weight decay, for the parameter groups that use it", least=0)
    seed: int = setting(0, "random seed of initial weights, image order, augmentation and dropout", least=0,
                        most=2**63 - 1)  # fmt: skip


@dataclass
class RunConfig(Settings):
    """Section `run`: device, speed and output of a training run.

    A setting `..._every` is a number of iterations; 0 turns this output off.
    """

    SECTION = "run."

    output: str = setting("output/training", "output folder for checkpoints, logs and settings")
    device: str = setting("auto", "auto, cpu, cuda or cuda:i")
    precision: str = setting("fp32", "precision of the network's products; losses and parameters stay "
                             "float32", choices=PRECISIONS)  # fmt: skip
    channels_last: bool = setting(True, "store images and features in channels-last memory layout")
    compile: bool = setting(False, "compile the network with torch.compile")
    deterministic: bool = setting(False, "on a GPU: use slower kernels that give bit-identical results")
    sync_batchnorm: bool = setting(False, "compute the statistics of batch norm, if it is not frozen, over "
                                   "the GPUs of all processes")  # fmt: skip
    workers: int = setting(4, "threads per process that read and augment images", least=1)
    log_every: int = setting(100, "iterations between two log entries; 0: none", least=0)
    picture_every: int = setting(1000, "iterations between two example figures in the log; 0: none", least=0)
    validate_every: int = setting(5000, "iterations between two validations; 0: none", least=0)
    save_every: int = setting(5000, "iterations between two checkpoints; 0: none", least=0)
    resume_every: int = setting(500, "iterations between two resume files; 0: none", least=0)
    keep: int = setting(5, "number of newest checkpoints to keep in addition to the final one; 0 keeps all",
                        least=0)  # fmt: skip
