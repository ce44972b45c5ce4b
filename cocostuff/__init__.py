"""COCO-Stuff as a benchmark of 171 classes without background, scored in 27 groups as in TagCLIP.

COCO-Stuff has the class ids 1..182, of which 11 are unused; its published files subtract 1 from the ids.
This project uses class indices 0..170 without gaps, in split files and in masks. `CATEGORY_IDS` maps class
indices to official ids.

`python -m cocostuff.prepare --root DIR` checks a copy of the data, makes the masks and writes the split file.
"""
import coco14
from segmentation.benchmark import Benchmark

# Group -> its classes by ascending id. The groups are the 27 coarse classes of unsupervised segmentation,
# things before stuff. Tagging uses these class names in its prompts.
GROUPS = {
    "electronic": ["tv", "laptop", "mouse", "remote", "keyboard", "cell phone"],
    "appliance": ["microwave", "oven", "toaster", "sink", "refrigerator"],
    "food things": ["banana", "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza",
        "donut", "cake"],
    "furniture things": ["chair", "couch", "pottedplant", "bed", "diningtable", "toilet"],
    "indoor": ["book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush"],
    "kitchen": ["bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl"],
    "accessory": ["backpack", "umbrella", "handbag", "tie", "suitcase"],
    "animal": ["bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe"],
    "outdoor": ["traffic light", "fire hydrant", "stop sign", "parking meter", "bench"],
    "person": ["person"],
    "sports": ["frisbee", "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove",
        "skateboard", "surfboard", "tennis racket"],
    "vehicle": ["bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat"],
    "ceiling": ["ceiling-other", "ceiling-tile"],
    "floor": ["carpet", "floor-marble", "floor-other", "floor-stone", "floor-tile", "floor-wood"],
    "food stuff": ["food-other", "fruit", "salad", "vegetable"],
    "furniture stuff": ["cabinet", "counter", "cupboard", "desk-stuff", "door-stuff", "furniture-other",
        "light", "mirror-stuff", "shelf", "stairs", "table"],
    "raw material": ["cardboard", "metal", "paper", "plastic"],
    "textile": ["banner", "blanket", "cloth", "clothes", "curtain", "mat", "napkin", "pillow", "rug",
        "textile-other", "towel"],
    "wall": ["wall-brick", "wall-concrete", "wall-other", "wall-panel", "wall-stone", "wall-tile",
        "wall-wood"],
    "window": ["window-blind", "window-other"],
    "building": ["bridge", "building-other", "house", "roof", "skyscraper", "tent"],
    "ground": ["dirt", "gravel", "ground-other", "mud", "pavement", "platform", "playingfield", "railroad",
        "road", "sand", "snow"],
    "plant": ["branch", "bush", "flower", "grass", "leaves", "moss", "plant-other", "straw", "tree"],
    "sky": ["clouds", "sky-other"],
    "solid": ["hill", "mountain", "rock", "solid-other", "stone", "wood"],
    "structural": ["cage", "fence", "net", "railing", "structural-other"],
    "water": ["fog", "river", "sea", "water-other", "waterdrops"],
}  # fmt: skip

# The groups of things by ascending id. Stuff classes have the ids after all things, in alphabetical order.
THINGS = [
    "person", "vehicle", "outdoor", "animal", "accessory", "sports", "kitchen", "food things",
    "furniture things", "electronic", "appliance", "indoor",
]  # fmt: skip
GROUP_OF = {name: group for group, names in GROUPS.items() for name in names}
CLASSES = [
    *(name for group in THINGS for name in GROUPS[group]),
    *sorted(name for name, group in GROUP_OF.items() if group not in THINGS),
]

# CAM prompts that differ from the class name, verbatim from TagCLIP: published numbers depend on them. They
# are the prompts of coco14, except that "snowboard" is misspelled only there.
PROMPTS = coco14.PROMPTS | {"airplane": "aeroplane", "tv": "tvmonitor screen", "snowboard": "snowboard"}

UNUSED_IDS = coco14.UNUSED_IDS | {91}  # reserved, never annotated
CATEGORY_IDS = [i for i in range(1, 183) if i not in UNUSED_IDS]  # [class index] -> official id
CLASS_INDEX = {category: index for index, category in enumerate(CATEGORY_IDS)}

BENCHMARK = Benchmark(
    name="cocostuff",
    classes=CLASSES,
    prompts=[PROMPTS.get(name, name) for name in CLASSES],
    backgrounds=["background"],  # for CAMs
    tag_backgrounds=[],
    box_threshold=0.7,
    has_background=False,
    groups=[list(GROUPS).index(GROUP_OF[name]) for name in CLASSES],
    group_names=list(GROUPS),
    labels="file",
    image_dir="JPEGImages/val2017",
    mask_dir="SegmentationClassStuff/val2017",
    category_ids=CATEGORY_IDS,
    split_file="./cocostuff/val.txt",
)
