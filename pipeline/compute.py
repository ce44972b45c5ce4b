"""Device, precision, processes and threads of a step, and the batch that fits in GPU memory."""

from dataclasses import dataclass
from pathlib import Path

import torch

import clip
from clip.model import CLIP, HEAD_WIDTH, VisionTransformer
from foundation.logs import log
from foundation.settings import Settings, setting
from pipeline.flow import FlowSettings
from pipeline.processes import cores, device_of
from pytorch_grad_cam.last_block import LABELS_AT_ONCE

# Images per batch: enough to keep a GPU busy. With a larger number, more batches of rare shapes are partial.
MAX_BATCH = 32
PREFETCHED_BATCHES = 8  # decoded ahead; images of equal size among them form batches
WRITERS = 4  # threads that write the results of a GPU: together about a thousand PNG and NumPy files a second
BF16_UNITS = {"avx512_bf16", "amx_bf16", "bf16"}  # flags in /proc/cpuinfo, of x86 and of ARM


@dataclass(frozen=True)
class ComputeSettings(Settings):
    """Device, precision and parallelism of a step. Only `precision`, `compile` and `batch_size` change
    results, by rounding."""

    device: str = setting("auto", "auto (a GPU if there is one), cpu, cuda or cuda:i", metavar="DEVICE")
    precision: str = setting(
        "fp32",
        "number type of the image tower's matrix products. bf16 is faster on GPUs and on CPUs with bf16 "
        "units; tf32 and fp16 are faster only on GPUs. Softmax, norms and sums are always float32",
        choices=clip.PRECISIONS,
    )
    compile: bool = setting(
        False, "compile the image tower's blocks; takes about a minute, and needs a C++ compiler on a CPU"
    )
    num_workers: int = setting(
        1,
        "number of processes, which are divided among the GPUs. On a CPU, one process already uses all cores",
        least=1,
    )
    threads: int | None = setting(
        None,
        "CPU threads of a process; each thread processes whole images (default: one thread per core). Fewer "
        "threads need less memory",
        least=1,
    )
    batch_size: int | None = setting(
        None,
        "images per batch; auto: as many as fit in the memory of a GPU, 1 on a CPU. A batch that runs out of "
        "memory is halved",
        least=1,
        none="auto",
    )
    prefetch: int | None = setting(
        None,
        "number of images that are decoded ahead and grouped by size into batches (default: "
        f"{PREFETCHED_BATCHES} batches, or 1 image if a batch is 1 image). Fewer images need less memory",
        least=1,
        aliases=["--look_ahead"],
    )
    decode_workers: int | None = setting(
        None,
        "decoding processes of each process that uses a GPU (default: its CPU cores minus one; on a CPU 0)",
        least=0,
    )

    def flow(self) -> FlowSettings:
        """Return the settings of the engine. By default, all cores but one per process decode for the GPU."""
        gpu = clip.pick_device(self.device).type == "cuda"
        batch = self.batch_size or (MAX_BATCH if gpu else 1)
        decode_workers = self.decode_workers
        if decode_workers is None:
            decode_workers = max(1, cores() // self.num_workers - 1) if gpu else 0
        return FlowSettings(
            batch_size=self.batch_size,
            prefetch=self.prefetch or (PREFETCHED_BATCHES * batch if batch > 1 else 1),
            threads=self.threads,
            decode_workers=decode_workers,
            write_workers=WRITERS,
        )

    def load(self, model: str, round_weights: bool | None, worker_index: int = 0) -> CLIP:
        """Load a CLIP for one process, see `clip.load`; `worker_index` selects the GPU."""
        device = device_of(self.device, worker_index)
        if worker_index == 0:
            warn_of_slow_precision(device, self.precision)
        log.debug("process %d: model %s on %s in %s", worker_index, model, device, self.precision)
        return clip.load(model, device, self.precision, round_weights, self.compile)


def warn_of_slow_precision(device: str, precision: str) -> None:
    """Log a warning if bfloat16 is emulated: on such a CPU it took 2.3 times as long as float32."""
    if precision == "bf16" and device == "cpu" and not has_bf16_units():
        log.warning(
            "warning: this CPU has no bfloat16 units, so --precision bf16 is slower than fp32 (measured: "
            "0.43 of its speed)"
        )


def has_bf16_units(cpuinfo: str | Path = "/proc/cpuinfo") -> bool:
    """Return whether the CPU multiplies bfloat16 in hardware; True if `cpuinfo` does not list its flags."""
    try:
        text = Path(cpuinfo).read_text()
    except OSError:  # not Linux
        return True
    lines = [line for line in text.splitlines() if line.lower().startswith(("flags", "features"))]
    return not lines or bool(BF16_UNITS & set(lines[0].split()))


def bytes_per_image(model: CLIP, patches: int) -> int:
    """Return an upper bound of the GPU memory in bytes for each image of a batch.

    The attention of the last block needs memory quadratic in the number of patches. The widest activations
    need linear memory; the gradient needs them for each of `LABELS_AT_ONCE` labels.
    """
    if not isinstance(model.visual, VisionTransformer):
        return patches * 2**20  # early stages have 64 positions per stride-32 cell and hundreds of channels
    width = model.config.vision_width
    heads = width // HEAD_WIDTH
    return 4 * patches**2 * (heads + 6) + 4 * patches * width * (12 * LABELS_AT_ONCE + 40)


def images_that_fit(model: CLIP, patches: int, threads: int, views: int = 1) -> int:
    """Return the number of images of this size that fit in GPU memory, per thread; on a CPU 1.

    On a CPU, batches contain one image. The result of an image is therefore bit for bit the same, whichever
    other images a run computes.

    Args:
        patches: number of patches of an image.
        threads: number of threads that share the GPU.
        views: number of views per image; they are computed together.
    """
    if model.device.type == "cpu":
        return 1
    unused = torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    free = 0.8 * (torch.cuda.mem_get_info(model.device)[0] + unused)  # a fifth is left for other programs
    return int(min(MAX_BATCH, max(1, free / max(1, threads) // (views * bytes_per_image(model, patches)))))
