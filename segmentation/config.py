"""Settings of the trainer: two sections of a training configuration."""

from dataclasses import dataclass

from common.settings import Settings, setting
from segmentation.inference import PRECISIONS


@dataclass
class OptimConfig(Settings):
    """Section `solver`: what the trained weights depend on. Methods add settings of their optimizer, schedule
    and losses. The defaults are deeplab-pytorch's for VOC12."""

    SECTION = "solver."

    iterations: int = setting(20_000, "iterations, each one step of the optimizer", least=1)
    batch_size: int = setting(5, "images of a batch, of all processes together", least=1)
    accumulate: int = setting(2, "batches of an iteration", least=1)
    drop_last: bool = setting(False, "leave out the images of an epoch that do not fill a batch, as SEAM "
                              "does; off: they form a smaller batch")  # fmt: skip
    learning_rate: float = setting(2.5e-4, "base rate, of parameter groups with factor 1", least=0)
    weight_decay: float = setting(5e-4, "of the parameter groups that have any", least=0)
    seed: int = setting(0, "of the weights, the order of the images, augmentation and dropout", least=0,
                        most=2**63 - 1)  # fmt: skip


@dataclass
class RunConfig(Settings):
    """Section `run`: where and how a training runs. Numbers named `..._every` are iterations; 0 is never."""

    SECTION = "run."

    output: str = setting("output/training", "folder of checkpoints, logs and settings")
    device: str = setting("auto", "auto, cpu, cuda or cuda:i")
    precision: str = setting("fp32", "of the network's products; losses and parameters stay float32",
                             choices=PRECISIONS)  # fmt: skip
    channels_last: bool = setting(True, "memory layout of images and features")
    compile: bool = setting(False, "use PyTorch's compiler")
    deterministic: bool = setting(False, "on a GPU: slower kernels that give the same bits every time")
    sync_batchnorm: bool = setting(False, "statistics of live batch norm over the GPUs of all processes")
    workers: int = setting(4, "threads of each process that read and augment", least=1)
    log_every: int = setting(100, "iterations between two log entries", least=0)
    picture_every: int = setting(1000, "iterations between two example figures in the log", least=0)
    validate_every: int = setting(5000, "iterations between two validations", least=0)
    save_every: int = setting(5000, "iterations between two checkpoints", least=0)
    resume_every: int = setting(500, "iterations between two resume files", least=0)
    keep: int = setting(5, "newest checkpoints that are kept beside the final one; 0 keeps all", least=0)
