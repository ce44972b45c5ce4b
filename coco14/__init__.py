"""MS COCO 2014 as a segmentation benchmark of 80 classes, with the prompts of CLIP-ES.

COCO's classes have two numberings. This project uses class indices 0..79 without gaps, in split files and,
as index + 1, in masks. The official files use 80 of the ids 1..90. `CATEGORY_IDS` maps indices to ids.

`python -m coco14.prepare --root DIR` checks a copy of the data, writes the split files and makes the masks
from the instances JSON. With `--year 2017` it does the same for COCO 2017, which has the same classes.
"""
from segmentation.benchmark import Benchmark

CLASSES = [
    "person", "bicycle", "car", "motorbike", "aeroplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
    "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple",
    "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "sofa",
    "pottedplant", "bed", "diningtable", "toilet", "tvmonitor", "laptop", "mouse", "remote", "keyboard",
    "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase",
    "scissors", "teddy bear", "hair drier", "toothbrush",
]  # fmt: skip

# Verbatim from CLIP-ES, including its misspellings: the published numbers depend on them.
PROMPTS = {
    "person": "person with clothes,people,human",
    "bird": "bird avian",
    "backpack": "backpack,bag",
    "umbrella": "umbrella,parasol",
    "handbag": "handbag,purse",
    "tie": "necktie",
    "snowboard": "sknowboard",
    "baseball glove": "glove",
    "spoon": "dessertspoon",
    "chair": "chair seat",
    "tvmonitor": "tvmonitor screen",
    "remote": "remote control",
    "hair drier": "hairdrier,blowdrier",
}

BACKGROUNDS = [
    "ground", "land", "grass", "tree", "building", "wall", "sky", "lake", "water", "river", "sea",
    "railway", "railroad", "helmet", "cloud", "house", "mountain", "ocean", "road", "rock", "street",
    "valley", "bridge",
]  # fmt: skip

UNUSED_IDS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}  # ids that COCO reserves and never annotates
CATEGORY_IDS = [i for i in range(1, 91) if i not in UNUSED_IDS]  # [class index] -> official id
CLASS_INDEX = {category: index for index, category in enumerate(CATEGORY_IDS)}

BENCHMARK = Benchmark(
    name="coco14",
    classes=CLASSES,
    prompts=[PROMPTS.get(name, name) for name in CLASSES],
    backgrounds=BACKGROUNDS,
    box_threshold=0.7,
    labels="file",
    image_dir="JPEGImages/train2014",
    mask_dir="SegmentationClass",
    category_ids=CATEGORY_IDS,
    split_file="./coco14/train.txt",
)
