"""With the committed checkpoint, CAMs, refinement and CRF reach mIoU floors that a broken stage cannot reach.

The floors are well below the results on train splits of 100 images over three seeds, and far above the
controls (docs/shapes.md). The tests draw fewer images. `pytest -s` prints the figures.
"""
from dataclasses import replace

import numpy as np
import pytest
import torch

import clip
from pipeline.cams import INITIAL, REFINED, CamSettings, image_cams
from pipeline.evaluate import Evaluation, count_cams
from pipeline.masks import MaskSettings, crf_posterior, mask_values, posterior_labels
from segmentation import camfile
from segmentation.images import find_image, read_image, read_rgb
from segmentation.labels import read_split, reader
from segmentation.masks import read_mask
from segmentation.metrics import confusion, scores
from shapes import BENCHMARK
from shapes.draw import write
from shapes.train_clip import build

IMAGES = 20
FLOORS = {"initial": 0.70, "refined": 0.70, "crf": 0.80}
CONTROL_CEILING = 0.30  # every stage of a control stays below


@pytest.fixture(scope="module", params=[0, 1, 2])
def world(request, tmp_path_factory):
    """A train split: [(image file, true labels, mask)]."""
    root = tmp_path_factory.mktemp(f"world{request.param}")
    write(root, train=IMAGES, val=0, seed=request.param)
    data = replace(BENCHMARK, root=str(root))
    labels = reader(data, {})
    names = read_split(data.path("ImageSets/Segmentation/train.txt"))
    return [
        (
            find_image(data.path(data.image_dir), name),
            labels(name),
            read_mask(data.path(data.mask_dir) / f"{name}.png"),
        )
        for name in names
    ]


def measure(model: clip.CLIP, world: list, shuffled: bool = False) -> dict[str, float]:
    """Return the mIoU of each stage; that of CAMs is the better one of background exponents 1 and 2."""
    text = clip.encode_prompts(model, BENCHMARK.prompts, BENCHMARK.templates)
    backgrounds = clip.encode_prompts(model, BENCHMARK.backgrounds, BENCHMARK.templates)
    settings = CamSettings(box_threshold=BENCHMARK.box_threshold, keep_initial=True)
    evaluation = Evaluation(BENCHMARK, cam_dir="", gt_root="")
    masks = MaskSettings().on("cpu")
    hists: dict = {}

    def add(stage, hist):
        hists[stage] = hists.get(stage, 0) + hist

    others = world[1:] + world[:1]
    for (file, labels, truth), (_, other, _) in zip(world, others, strict=True):
        class_ids = np.array(other if shuffled else labels)
        maps = image_cams(model, read_image(file), text[class_ids], backgrounds, settings)
        full = {kind: camfile.resize(cams, truth.shape).astype(np.float16) for kind, cams in maps.items()}
        for stage, kind in (("initial", INITIAL), ("refined", REFINED)):
            counted, _ = count_cams(truth, class_ids, full[kind], evaluation)
            for exponent, hist in enumerate(counted):
                add((stage, exponent), hist)
        posterior = crf_posterior(read_rgb(file), full[REFINED], masks, add_background=True)
        refined = posterior_labels(posterior, mask_values(class_ids, BENCHMARK))
        add(("crf", 0), confusion(truth, refined, BENCHMARK.channels))
    best: dict[str, float] = {}
    for (stage, _), hist in hists.items():
        best[stage] = max(best.get(stage, 0), scores(hist)["Mean IoU"])
    print({stage: round(value, 3) for stage, value in best.items()})
    return best


@pytest.fixture(scope="module")
def trained():
    torch.set_num_threads(1)
    return clip.load(BENCHMARK.model, device="cpu")


def test_trained_clip_reaches_the_floors_and_crf_improves(world, trained):
    miou = measure(trained, world)
    for stage, floor in FLOORS.items():
        assert miou[stage] >= floor, (stage, miou)
    assert miou["crf"] > miou["refined"]


def test_shuffled_labels_stay_below_the_control_ceiling(world, trained):
    assert max(measure(trained, world, shuffled=True).values()) < CONTROL_CEILING


def test_untrained_clip_stays_below_the_control_ceiling(world):
    model = build(seed=0).eval().requires_grad_(False)
    assert max(measure(model, world).values()) < CONTROL_CEILING
