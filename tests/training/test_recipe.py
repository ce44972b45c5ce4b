"""A recipe is sufficient to define a method: training without masks, resuming and testing; see `toy`."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from foundation.files import sha256
from pipeline.run import command
from segmentation.checkpoints import FINAL, RESUME
from segmentation.masks import read_mask
from segmentation.trainer import Trainer
from tests import training_world
from tests.training import toy
from training import config as configs
from training import test, train

CONFIG = """
data: {{benchmark: shapes, root: {root}, train_split: {root}/train.txt, val_split: {root}/val.txt}}
model: {{clip: {root}/clip.pth}}
solver: {{iterations: 8, batch_size: 3, accumulate: 1, learning_rate: 1e-2, min_rate: 1e-4}}
run: {{device: cpu, workers: 1, log_every: 1, picture_every: 4, validate_every: 4, save_every: 2,
       resume_every: 1}}
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    training_world.write_world(root)
    torch.manual_seed(0)
    torch.save(toy.Toy(2).clip.state_dict(), root / "clip.pth")
    (root / "toy.yaml").write_text(CONFIG.format(root=root))
    return root


def trainer_of(world, output, resume: bool = False) -> Trainer:
    config = configs.read(toy.Config, world / "toy.yaml", [f"run.output={output}"])
    return train.prepare(toy.RECIPE, config, resume=resume)


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """The folder of an uninterrupted run, and its trainer."""
    folder = tmp_path_factory.mktemp("trained")
    trainer = trainer_of(world, folder)
    assert trainer.run()
    return folder, trainer


def test_frozen_modules_are_not_trained_and_not_saved(world, trained):
    folder, trainer = trained
    assert list(torch.load(folder / FINAL, weights_only=True)) == ["decoder.weight", "decoder.bias"]
    trained_parameters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert len(trained_parameters) == 2 and all(p.requires_grad for p in trained_parameters)
    assert not any(p.requires_grad for p in trainer.model.clip.parameters())
    expected = torch.load(world / "clip.pth", weights_only=True)
    assert all(torch.equal(value, expected[key]) for key, value in trainer.model.clip.state_dict().items())
    record = json.loads((folder / "settings.json").read_text())
    assert record["step"] == "toy.train" and record["settings"]["prototypes.momentum"] == 0.9
    assert record["inputs"] == {"init": "", "clip": sha256(world / "clip.pth")}


def test_each_group_follows_the_schedule_from_its_base_rate(trained):
    folder, trainer = trained
    logs = EventAccumulator(str(folder / "logs")).Reload()
    for group, base in enumerate((1e-2, 0.0)):
        rates = [event.value for event in logs.Scalars(f"lr/group_{group}")]
        expected = [toy.rate_of(trainer.optim, base, done) for done in range(8)]
        np.testing.assert_allclose(rates, expected, rtol=1e-6)
    assert 0 < rates[-1] < 1e-4 and rates[0] == 0
    assert {"validation/Mean IoU", "loss/seg"} <= {*logs.Tags()["scalars"]}


def test_resuming_restores_the_state_of_the_objective_exactly(world, trained, tmp_path):
    folder, uninterrupted = trained
    trainer, calls = trainer_of(world, tmp_path), []
    objective = trainer.objective

    class Stopping(toy.OnlineLabels):
        def __call__(self, network, batch, global_count):
            calls.append(batch)
            if len(calls) == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__call__(network, batch, global_count)

    objective.__class__ = Stopping
    assert trainer.run() is False
    state = torch.load(tmp_path / RESUME, weights_only=True)
    assert state["iteration"] == 5 and torch.equal(state["objective"]["prototypes"], objective.prototypes)
    assert list(state["model"]) == ["decoder.weight", "decoder.bias"]
    resumed = trainer_of(world, tmp_path, resume=True)
    assert resumed.run()
    assert torch.equal(resumed.objective.prototypes, uninterrupted.objective.prototypes)
    first, second = (torch.load(f / FINAL, weights_only=True) for f in (folder, tmp_path))
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    batch = calls[0]  # arguments of the objective
    assert batch.extras["image_labels"].dtype == torch.bool and len(batch.extras["image_labels"]) == 3
    assert batch.extras["caption"] == [f"a photo of {name}" for name in batch.names]
    assert {*batch.labels.unique().tolist()} <= {0, 255}


@pytest.mark.parametrize("iteration", [3, 8])
def test_run_folder_removed_during_training_is_reported_and_training_resumes(
    world, trained, tmp_path, monkeypatch, capsys, iteration
):
    folder, iterate = tmp_path / "run", Trainer.iterate

    def remove(self, chunk):
        result = iterate(self, chunk)
        if self.done == iteration:
            shutil.rmtree(folder)
        return result

    def run(*flags) -> tuple[int, str]:
        words = ["--config", f"{world}/toy.yaml", f"run.output={folder}", *flags]
        with pytest.raises(SystemExit) as end:
            command(lambda: train.main(toy.RECIPE, words))
        return end.value.code, capsys.readouterr().err

    monkeypatch.setattr(Trainer, "iterate", remove)
    code, printed = run()
    last = printed.splitlines()[-1]
    assert code == 1 and last.startswith(f"error: {folder} was removed or emptied during the run")
    assert "--resume continues" in last and "Traceback" not in printed
    assert (folder / (FINAL if iteration == 8 else RESUME)).is_file()
    monkeypatch.setattr(Trainer, "iterate", iterate)
    assert run("--resume")[0] == 0
    first, second = (torch.load(f / FINAL, weights_only=True) for f in (trained[0], folder))
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_the_network_is_tested_with_its_own_protocol(world, trained, tmp_path):
    folder, _ = trained
    assert test.main(toy.RECIPE, ["--run", str(folder), "--device", "cpu", "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "scores.json").read_text())
    assert report["images"] == 3 and report["protocol"]["longer_side"] == 48
    assert read_mask(tmp_path / "masks" / "image_5.png").shape == (40, 52)
    record = json.loads((tmp_path / "settings.json").read_text())
    assert record["step"] == "toy.test" and record["inputs"]["clip"] == sha256(world / "clip.pth")


def test_resuming_with_other_frozen_weights_raises(world, trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    torch.save(toy.Toy(2).clip.state_dict(), tmp_path / "other.pth")
    words = [f"run.output={tmp_path}/run", f"model.clip={tmp_path}/other.pth"]
    config = configs.read(toy.Config, world / "toy.yaml", words)
    with pytest.raises(ValueError, match="clip"):
        train.prepare(toy.RECIPE, config, resume=True)
