"""The built-in benchmark: a drawn world in VOC layout, and a small CLIP trained on it.

`python -m shapes.draw` draws the images. After that, `--benchmark shapes` selects the benchmark in all
commands. See docs/shapes.md.
"""
from pathlib import Path

from segmentation.benchmark import Benchmark
from shapes.world import BACKGROUNDS, CAPTION_TEMPLATES, CLASSES

BENCHMARK = Benchmark(
    name="shapes",
    classes=[kind.name for kind in CLASSES],
    backgrounds=[kind.name for kind in BACKGROUNDS],
    templates=list(CAPTION_TEMPLATES),
    box_threshold=0.4,
    labels="voc_xml",
    root="output/shapes",
    mask_dir="SegmentationClass",
    split_file="output/shapes/ImageSets/Segmentation/train.txt",
    model=str(Path(__file__).with_name("clip_shapes.pt")),
)
