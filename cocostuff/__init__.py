"""COCO-Stuff as a benchmark of 171 classes without a background, scored in 27 groups as TagCLIP does.

COCO-Stuff numbers its classes 1..182 and leaves 11 of these ids unused; public files count the ids from 0.
Here, in split files and in masks, classes count 0..170 without gaps. `CATEGORY_IDS` is the one table
between the two.

`python -m cocostuff.prepare --root DIR` checks a copy of the data, makes the masks and writes the split file.
"""
from segmentation.benchmark import Benchmark

# Class -> the group it is scored in, by ascending id. The names are those that tagging reads.
GROUP_OF = {
    "person": "person", "bicycle": "vehicle", "car": "vehicle", "motorcycle": "vehicle",
    "airplane": "vehicle", "bus": "vehicle", "train": "vehicle", "truck": "vehicle", "boat": "vehicle",
    "traffic light": "outdoor", "fire hydrant": "outdoor", "stop sign": "outdoor", "parking meter": "outdoor",
    "bench": "outdoor", "bird": "animal", "cat": "animal", "dog": "animal", "horse": "animal",
    "sheep": "animal", "cow": "animal", "elephant": "animal", "bear": "animal", "zebra": "animal",
    "giraffe": "animal", "backpack": "accessory", "umbrella": "accessory", "handbag": "accessory",
    "tie": "accessory", "suitcase": "accessory", "frisbee": "sports", "skis": "sports", "snowboard": "sports",
    "sports ball": "sports", "kite": "sports", "baseball bat": "sports", "baseball glove": "sports",
    "skateboard": "sports", "surfboard": "sports", "tennis racket": "sports", "bottle": "kitchen",
    "wine glass": "kitchen", "cup": "kitchen", "fork": "kitchen", "knife": "kitchen", "spoon": "kitchen",
    "bowl": "kitchen", "banana": "food things", "apple": "food things", "sandwich": "food things",
    "orange": "food things", "broccoli": "food things", "carrot": "food things", "hot dog": "food things",
    "pizza": "food things", "donut": "food things", "cake": "food things", "chair": "furniture things",
    "couch": "furniture things", "pottedplant": "furniture things", "bed": "furniture things",
    "diningtable": "furniture things", "toilet": "furniture things", "tv": "electronic",
    "laptop": "electronic", "mouse": "electronic", "remote": "electronic", "keyboard": "electronic",
    "cell phone": "electronic", "microwave": "appliance", "oven": "appliance", "toaster": "appliance",
    "sink": "appliance", "refrigerator": "appliance", "book": "indoor", "clock": "indoor", "vase": "indoor",
    "scissors": "indoor", "teddy bear": "indoor", "hair drier": "indoor", "toothbrush": "indoor",
    "banner": "textile", "blanket": "textile", "branch": "plant", "bridge": "building",
    "building-other": "building", "bush": "plant", "cabinet": "furniture stuff", "cage": "structural",
    "cardboard": "raw material", "carpet": "floor", "ceiling-other": "ceiling", "ceiling-tile": "ceiling",
    "cloth": "textile", "clothes": "textile", "clouds": "sky", "counter": "furniture stuff",
    "cupboard": "furniture stuff", "curtain": "textile", "desk-stuff": "furniture stuff", "dirt": "ground",
    "door-stuff": "furniture stuff", "fence": "structural", "floor-marble": "floor", "floor-other": "floor",
    "floor-stone": "floor", "floor-tile": "floor", "floor-wood": "floor", "flower": "plant", "fog": "water",
    "food-other": "food stuff", "fruit": "food stuff", "furniture-other": "furniture stuff", "grass": "plant",
    "gravel": "ground", "ground-other": "ground", "hill": "solid", "house": "building", "leaves": "plant",
    "light": "furniture stuff", "mat": "textile", "metal": "raw material", "mirror-stuff": "furniture stuff",
    "moss": "plant", "mountain": "solid", "mud": "ground", "napkin": "textile", "net": "structural",
    "paper": "raw material", "pavement": "ground", "pillow": "textile", "plant-other": "plant",
    "plastic": "raw material", "platform": "ground", "playingfield": "ground", "railing": "structural",
    "railroad": "ground", "river": "water", "road": "ground", "rock": "solid", "roof": "building",
    "rug": "textile", "salad": "food stuff", "sand": "ground", "sea": "water", "shelf": "furniture stuff",
    "sky-other": "sky", "skyscraper": "building", "snow": "ground", "solid-other": "solid",
    "stairs": "furniture stuff", "stone": "solid", "straw": "plant", "structural-other": "structural",
    "table": "furniture stuff", "tent": "building", "textile-other": "textile", "towel": "textile",
    "tree": "plant", "vegetable": "food stuff", "wall-brick": "wall", "wall-concrete": "wall",
    "wall-other": "wall", "wall-panel": "wall", "wall-stone": "wall", "wall-tile": "wall",
    "wall-wood": "wall", "water-other": "water", "waterdrops": "water", "window-blind": "window",
    "window-other": "window", "wood": "solid",
}  # fmt: skip
CLASSES = list(GROUP_OF)

# Things, then stuff: the coarse classes of unsupervised segmentation.
GROUPS = [
    "electronic", "appliance", "food things", "furniture things", "indoor", "kitchen", "accessory", "animal",
    "outdoor", "person", "sports", "vehicle", "ceiling", "floor", "food stuff", "furniture stuff",
    "raw material", "textile", "wall", "window", "building", "ground", "plant", "sky", "solid", "structural",
    "water",
]  # fmt: skip

# What CAMs are prompted with where a bare name serves them less; verbatim, as the published numbers need.
PROMPTS = {
    "person": "person with clothes,people,human",
    "airplane": "aeroplane",
    "bird": "bird avian",
    "backpack": "backpack,bag",
    "umbrella": "umbrella,parasol",
    "handbag": "handbag,purse",
    "tie": "necktie",
    "baseball glove": "glove",
    "spoon": "dessertspoon",
    "chair": "chair seat",
    "tv": "tvmonitor screen",
    "remote": "remote control",
    "hair drier": "hairdrier,blowdrier",
}

UNUSED_IDS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91}  # numbered, annotated nowhere
CATEGORY_IDS = [i for i in range(1, 183) if i not in UNUSED_IDS]  # [class index] -> official id
CLASS_INDEX = {category: index for index, category in enumerate(CATEGORY_IDS)}

BENCHMARK = Benchmark(
    name="cocostuff",
    classes=CLASSES,
    prompts=[PROMPTS.get(name, name) for name in CLASSES],
    backgrounds=["background"],  # of CAMs
    tag_backgrounds=[],
    box_threshold=0.7,
    has_background=False,
    groups=[GROUPS.index(group) for group in GROUP_OF.values()],
    group_names=GROUPS,
    labels="file",
    image_dir="JPEGImages/val2017",
    mask_dir="SegmentationClassStuff/val2017",
    category_ids=CATEGORY_IDS,
    split_file="./cocostuff/val.txt",
)
