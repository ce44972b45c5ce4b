"""The configurations have the values of the published recipes."""
from pathlib import Path

import pytest

import deeplab
from deeplab.config import Config
from deeplab.recipe import RECIPE
from refinement.densecrf import PRESETS
from segmentation import benchmark as benchmarks
from segmentation.losses import LOSSES
from training import config as configs

FOLDER = Path(deeplab.__file__).parent / "configs"
V2, R38 = "deeplab_v2", "deeplab_v1_r38"
NARROW = [0.5, 0.75, 1.0, 1.25, 1.5]
WIDE = [*NARROW, 1.75, 2.0]

# network, benchmark, initial weights, learning rate, batch x accumulate, iterations, scales, crop, loss
RECIPES = {
    "voc12": (V2, "voc12", "coco", 2.5e-4, (5, 2), 20_000, NARROW, 321, "ce"),
    "voc12_clip_es_imagenet": (V2, "voc12", "imagenet", 2e-4, (5, 2), 20_000, NARROW, 321, "ce"),
    "voc12_clip_es_coco": (V2, "voc12", "coco", 2.5e-5, (5, 2), 20_000, NARROW, 321, "ce"),
    "voc12_advcam": (V2, "voc12", "imagenet", 2.5e-4, (10, 1), 30_000, WIDE, 321, "balanced"),
    "voc12_clims_imagenet": (V2, "voc12", "imagenet", 2.5e-4, (10, 2), 30_000, WIDE, 321, "balanced"),
    "voc12_clims_coco": (V2, "voc12", "coco", 2.5e-4, (5, 2), 20_000, NARROW, 321, "ce"),
    "coco14": (V2, "coco14", "imagenet", 2e-4, (10, 2), 100_000, NARROW, 321, "ce"),
    "voc12_r38_seam": (R38, "voc12", "res38", 1e-3, (10, 1), 20_000, [0.5, 1.5], 448, "ce"),
    "voc12_r38_weakclip": (R38, "voc12", "res38", 1e-3, (10, 1), 40_000, [0.5, 1.5], 448, "ce"),
    "coco14_r38_weakclip": (R38, "coco14", "res38", 1.5e-3, (10, 1), 160_000, [0.5, 1.5], 448, "ce"),
}  # fmt: skip


def test_every_configuration_is_tested():
    assert {file.stem for file in FOLDER.glob("*.yaml")} == {*RECIPES, "shapes"}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_has_the_published_values(name):
    config = configs.read(Config, FOLDER / f"{name}.yaml")
    solver, augment = config.solver, config.augment
    init = next(kind for kind in ("coco", "imagenet", "res38") if kind in config.model.init)
    scales = augment.scales if config.model.network == V2 else augment.scale_range
    values = (
        config.model.network, config.data.benchmark, init, solver.learning_rate,
        (solver.batch_size, solver.accumulate), solver.iterations, scales, augment.crop, solver.loss,
    )  # fmt: skip
    assert values == RECIPES[name]
    assert (solver.momentum, solver.weight_decay, solver.power) == (0.9, 5e-4, 0.9)
    if config.model.network == V2:
        assert (solver.decay_every, solver.drop_last) == (10, False)
        assert config.model.scales == [0.5, 0.75]
    else:
        assert (solver.decay_every, solver.drop_last) == (1, True)


@pytest.mark.parametrize("name", [*RECIPES, "shapes"])
def test_names_in_a_configuration_exist(name):
    config = configs.read(Config, FOLDER / f"{name}.yaml")
    assert RECIPE.network(config).build
    assert benchmarks.load(config.data.benchmark).channels
    assert config.solver.loss in LOSSES
    assert config.test.crf is None or config.test.crf in PRESETS
    assert config.data.val_split != config.data.train_split
