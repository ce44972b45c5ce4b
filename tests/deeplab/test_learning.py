"""A narrow DeepLab learns the drawn world from pseudo masks, and does not learn it from shuffled masks.

The floor is below the mIoU on three worlds (40 to 56 %), the ceiling above that of their controls (6 to 7 %).
The training is much shorter than the recipe, whose figures are in docs/shapes.md. `pytest -s` prints the
figures.
"""
import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import clip
from deeplab import test as deeplab_test
from deeplab import train
from pipeline.cams import REFINED, CamSettings, image_cams
from pipeline.masks import MaskSettings, crf_posterior, mask_values, posterior_labels
from segmentation import camfile
from segmentation.images import find_image, read_image, read_rgb
from segmentation.labels import read_split, reader
from segmentation.masks import read_mask, write_mask
from shapes import BENCHMARK
from shapes.draw import write

RECIPE = Path(train.__file__).parent / "configs" / "shapes.yaml"
FLOOR, CONTROL_CEILING = 0.28, 0.15
IMAGES = {"train": 48, "val": 12}
FEWER = [
    "solver.iterations=180", "test.scales=[1.5]", "test.flip=false", "test.crf=none", "run.picture_every=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Images, ground truth, pseudo masks in `pseudo`, and pseudo masks of other images in `shuffled`."""
    root = tmp_path_factory.mktemp("world")
    write(root, **IMAGES, seed=0)
    data = replace(BENCHMARK, root=str(root))
    torch.set_num_threads(1)
    model = clip.load(BENCHMARK.model, device="cpu")
    text = clip.encode_prompts(model, BENCHMARK.prompts, BENCHMARK.templates)
    backgrounds = clip.encode_prompts(model, BENCHMARK.backgrounds, BENCHMARK.templates)
    settings = CamSettings(box_threshold=BENCHMARK.box_threshold)
    masks = MaskSettings(crf_backend="numba")
    labels_of = reader(data, {})
    names = list(read_split(root / "ImageSets/Segmentation/train.txt"))
    for name in names:
        file = find_image(root / "JPEGImages", name)
        image, class_ids = read_rgb(file), labels_of(name)
        cams = image_cams(model, read_image(file), text[class_ids], backgrounds, settings)[REFINED]
        full = camfile.resize(cams, image.shape[:2]).astype(np.float16)
        posterior = crf_posterior(image, full, masks, add_background=True)
        labels = posterior_labels(posterior, mask_values(class_ids, BENCHMARK), masks.confidence)
        write_mask(root / "pseudo" / f"{name}.png", labels, data.palette)
    for name, other in zip(names, names[1:] + names[:1], strict=True):
        size = read_mask(root / "pseudo" / f"{name}.png").shape
        mask = read_mask(root / "pseudo" / f"{other}.png")
        mask = cv2.resize(mask, size[::-1], interpolation=cv2.INTER_NEAREST)
        write_mask(root / "shuffled" / f"{name}.png", mask, data.palette)
    return root


def trained_on(masks: str, world: Path, output: Path) -> float:
    """Return the mIoU on val of a network that the commands train on a folder of masks."""
    lists = world / "ImageSets" / "Segmentation"
    words = [
        f"data.root={world}", f"data.train_split={lists}/train.txt", f"data.label_dir={world}/{masks}",
        f"data.val_split={lists}/val.txt", f"data.val_label_dir={world}/SegmentationClass",
        f"run.output={output}", *FEWER,
    ]  # fmt: skip
    assert train.main(["--config", str(RECIPE), *words]) == 0
    assert deeplab_test.main(["--run", str(output)]) == 0
    miou = json.loads((output / "test" / "scores.json").read_text())["best"]["Mean IoU"]
    print(f"{masks}: {miou:.3f}")
    return miou


def test_training_on_pseudo_masks_reaches_the_floor(world, tmp_path):
    assert trained_on("pseudo", world, tmp_path / "run") >= FLOOR


def test_training_on_shuffled_masks_stays_below_the_ceiling(world, tmp_path):
    assert trained_on("shuffled", world, tmp_path / "run") < CONTROL_CEILING
