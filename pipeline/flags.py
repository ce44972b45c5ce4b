"""Flags that scripts share."""
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from segmentation.benchmark import Benchmark

MODEL_HELP = "CLIP checkpoint file, name of an OpenAI model (ViT-B/16, RN50, ...) or open_clip model:tag"
LABELS_HELP = "file of lines `id index index ...` that replaces the benchmark's labels"


def add_benchmark_flag(flag: Callable, recorded_in: str = "") -> None:
    """Add --benchmark; required, unless a folder of an earlier step records it."""
    help = "data set: voc12, coco14, cocostuff, shapes or a YAML file that describes it"
    help += f" (default: the one recorded in {recorded_in})" if recorded_in else ""
    flag("--benchmark", "--dataset", required=not recorded_in, metavar="NAME|FILE.yaml", help=help)


def add_image_flags(flag: Callable, split: str = "the benchmark's") -> None:
    """Add --image_root and --split_file."""
    flag("--image_root", "--img_root", metavar="DIR", help="image folder (default: the benchmark's)")
    flag("--split_file", metavar="FILE", help=f"image ids, one per line (default: {split})")


def recorded_path(name: str) -> str:
    """Return a benchmark's name, or the absolute path of its file, valid in any working directory."""
    return str(Path(name).absolute()) if name.endswith((".yaml", ".yml")) else name


def beside_images(benchmark: Benchmark, image_root: str | Path) -> Benchmark:
    """Return the benchmark with a new root: the folder of the data set that contains `image_root`.

    The reference scripts have a flag only for the image folder. If the new root has no folder of annotations
    or masks, the benchmark is returned unchanged.
    """
    folder = {"voc_xml": benchmark.annotation_dir, "masks": benchmark.mask_dir}.get(benchmark.labels)
    root = Path(image_root).absolute()
    for _ in Path(benchmark.image_dir).parts:
        root = root.parent
    if folder is None or not (root / folder).is_dir():
        return benchmark
    return replace(benchmark, root=str(root))
