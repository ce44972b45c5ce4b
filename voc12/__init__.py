"""PASCAL VOC 2012 with the SBD masks ("train_aug") and the prompts of CLIP-ES.

`python -m voc12.prepare --root DIR` checks a copy of the data and writes the split files. With
`--year 2007` it does the same for VOC 2007, which has the same classes.
"""
from segmentation.benchmark import Benchmark

CLASSES = [
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
]  # fmt: skip

# Prompts that differ from the class name, from CLIP-ES (synonym fusion at sentence level): the added words
# make an ambiguous name unambiguous for CLIP.
PROMPTS = {
    "bird": "bird avian",
    "chair": "chair seat",
    "person": "person with clothes,people,human",
    "tvmonitor": "tvmonitor screen",
}

BACKGROUNDS = [
    "ground", "land", "grass", "tree", "building", "wall", "sky", "lake", "water", "river", "sea",
    "railway", "railroad", "keyboard", "helmet", "cloud", "house", "mountain", "ocean", "road", "rock",
    "street", "valley", "bridge", "sign",
]  # fmt: skip

BENCHMARK = Benchmark(
    name="voc12",
    classes=CLASSES,
    prompts=[PROMPTS.get(name, name) for name in CLASSES],
    backgrounds=BACKGROUNDS,
    box_threshold=0.4,
    labels="voc_xml",
    mask_dir="SegmentationClassAug",
    split_file="./voc12/train.txt",
)
