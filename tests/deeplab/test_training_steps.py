"""Three optimiser steps of both networks, as the trainer makes them of the published recipes."""
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from deeplab import model as network_a
from deeplab import resnet38 as network_b
from deeplab.config import Config, OptimConfig
from deeplab.recipe import NETWORKS, objective
from segmentation.config import RunConfig
from segmentation.dataset import Batch, TrainingSet
from segmentation.losses import LOSSES
from segmentation.trainer import Trainer
from tests.conftest import relative
from tests.deeplab.common import fill_a, golden, input_a, input_b, labels, summary
from tests.weights import fill_module


def trainer_of(name: str, model: nn.Module, solver: OptimConfig, output: Path) -> tuple[Trainer, list]:
    """A trainer as `deeplab.train` makes it, to be handed its batches, and a list that grows by the losses of
    each and the summaries of the gradients that were there before it."""
    config = Config(solver=solver)
    network, losses, seen = NETWORKS[name], objective(config), []

    def noting(*arguments):
        before = gradients(model) if len(seen) == 1 else None
        found = losses(*arguments)
        seen.append(([loss.item() for loss in found.values()], before))
        return found

    unread = TrainingSet(["unread"] * solver.batch_size, "", "", 5, network.transform(config))
    optimizer, schedule = network.optimizer(model, config)
    run = RunConfig(str(output), "cpu")
    return Trainer(model, optimizer, schedule, noting, unread, solver, run), seen


def rates(trainer: Trainer) -> list[float]:
    return [group["lr"] for group in trainer.optimizer.param_groups]


def batch(images: list[torch.Tensor], truth: np.ndarray) -> Batch:
    return Batch(torch.cat(images).numpy(), truth, ["unread"] * len(truth))


def train_affine(model):
    """The golden gradients include batch norm's, which no optimiser uses."""
    for part in model.modules():
        if isinstance(part, _BatchNorm):
            part.requires_grad_(True)


def gradients(model):
    nothing = np.full(18, np.nan)
    return np.stack([nothing if p.grad is None else summary(p.grad) for p in model.parameters()])


def parameters(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def summaries(values):
    return np.stack([summary(value) for value in values])


def assert_rows(found, expected, tolerance, of_sum=None):
    """Tolerances are of a row's norm; the sum of a row cancels and may have its own. Zero stays zero."""
    assert found.shape == expected.shape
    assert np.array_equal(np.isnan(found), np.isnan(expected))
    zero = (expected == 0).all(axis=1)
    assert np.array_equal((found == 0).all(axis=1), zero)
    rows = ~zero & ~np.isnan(expected).any(axis=1)
    error = np.abs(found - expected)[rows] / expected[rows, 1:2]
    assert error[:, 1:].max() < tolerance
    assert error[:, 0].max() < (of_sum or tolerance)


@pytest.mark.parametrize("loss", LOSSES)
def test_network_a(tmp_path, loss):
    expected = golden("a_train")
    model = fill_a(network_a.build_v2(5, (1, 1, 1, 1))).train()
    assert [name for name, _ in model.named_parameters()] == list(expected["names"])
    train_affine(model)
    solver = OptimConfig(
        iterations=6, batch_size=2, accumulate=2, learning_rate=2e-5, decay_every=2, loss=loss
    )
    start, lrs = parameters(model), []
    trainer, seen = trainer_of("deeplab_v2", model, solver, tmp_path)
    for step in range(3):
        chunk = [
            batch(
                [input_a(f"dl:t{number}_{image}", 65, 65) for image in range(2)],
                labels(f"dl:tl{number}", (2, 65, 65), 5, block=8),
            )
            for number in (2 * step, 2 * step + 1)
        ]
        told = trainer.iterate(chunk)
        assert np.allclose(list(told.values()), np.mean([terms for terms, _ in seen[-2:]], axis=0), rtol=1e-6)
        lrs.append(rates(trainer))
        if step in (0, 2):
            now = parameters(model)
            assert_rows(summaries(now.values()), expected[f"{loss}_param_step{step + 1}"], 1e-5, 1e-3)
            moved = summaries(now[name] - start[name] for name in now)
            assert_rows(moved, expected[f"{loss}_delta_step{step + 1}"], 2e-3, 2e-2)
    assert_rows(seen[1][1], expected[f"{loss}_grad_mb0"], 1e-4)
    assert np.allclose(lrs, expected["lrs"], rtol=1e-9, atol=0)
    assert relative([terms for terms, _ in seen], expected[f"{loss}_losses"]) < 1e-5
    assert torch.equal(
        model.base.layer1.conv1.bn.running_mean, torch.from_numpy(expected[f"{loss}_stem_running_mean"])
    )
    with torch.no_grad():
        after = model.eval()(input_a("dl:plain0", 65, 65))
    assert relative(after, expected[f"{loss}_eval_after3"]) < 1e-2


def run_b(output, frozen, dtype):
    """Three steps of the narrow network -> everything that b_train.npz has."""
    model = fill_module(network_b.build_r38(5, width=4, freeze_bn=frozen)).to(dtype).train()
    for part in model.modules():
        if isinstance(part, nn.Dropout | nn.Dropout2d):
            part.p = 0
    train_affine(nn.ModuleList([model.bn_fov, model.bn_fov2]) if frozen else model)
    start, lrs = parameters(model), []
    solver = OptimConfig(iterations=5, batch_size=3, accumulate=1, learning_rate=1e-3, decay_every=1)
    trainer, seen = trainer_of("deeplab_v1_r38", model, solver, output)
    body, weights, biases = (len(group["params"]) for group in network_a.parameter_groups(model))
    sizes = [body, 0, weights, biases]  # SEAM has a group for the backbone's biases, of which there are none
    run = {"names": list(start), "group_sizes": sizes}
    for step in range(3):
        images = [input_b(f"r38:t{step}_{image}", 41, 41) for image in range(3)]
        trainer.iterate([batch(images, labels(f"r38:tl{step}", (3, 41, 41), 5, block=8))])
        lrs.append(rates(trainer))
        if step == 0:
            run["grad0"] = gradients(model)
        now = parameters(model)
        run[f"delta_step{step + 1}"] = summaries(now[name] - start[name] for name in now)
    run |= {"losses": [terms[0] for terms, _ in seen], "lrs": lrs}
    run["bn7_running_mean"] = model.backbone.bn7.running_mean
    run["bn_fov_running_var"] = model.bn_fov.running_var
    return run


@pytest.fixture(scope="module")
def expected_b():
    return golden("b_train")


def assert_common(run, expected, key):
    assert run["names"] == list(expected["names"])
    sizes = expected[f"{key}_group_sizes"]  # the optimizer has no empty group
    assert run["group_sizes"] == list(sizes)
    assert np.allclose(run["lrs"], expected["lrs"][:, sizes > 0], rtol=1e-9, atol=0)
    for statistic in ("bn7_running_mean", "bn_fov_running_var"):
        assert relative(run[statistic], expected[f"{key}_{statistic}"]) < 1e-4


def test_network_b_frozen(expected_b, tmp_path):
    run = run_b(tmp_path, frozen=True, dtype=torch.float32)
    assert_common(run, expected_b, "frozen")
    assert relative(run["losses"], expected_b["frozen_losses"]) < 1e-4
    for table in ("grad0", "delta_step1", "delta_step3"):
        assert_rows(run[table], expected_b[f"frozen_{table}"], 1e-3)


def test_network_b_live(expected_b, tmp_path):
    """In float64: an activation lies so close to a kink of ReLU that float32 kernels differ in its sign."""
    run = run_b(tmp_path, frozen=False, dtype=torch.float64)
    assert_common(run, expected_b, "live")
    assert relative(run["losses"], expected_b["live_losses"]) < 1e-5
    assert_rows(run["grad0"], expected_b["live_grad0"], 1e-3)
    for step in (1, 3):
        assert_rows(run[f"delta_step{step}"], expected_b[f"live_delta_step{step}"], 1e-3, 5e-3)


def test_network_b_live_in_float32(expected_b, tmp_path):
    """What does not hang on that activation."""
    run = run_b(tmp_path, frozen=False, dtype=torch.float32)
    assert_common(run, expected_b, "live")
    assert relative(run["losses"][0], expected_b["live_losses"][0]) < 1e-4
    for table in ("grad0", "delta_step1", "delta_step3"):
        expected = expected_b[f"live_{table}"]
        assert np.array_equal(np.isnan(run[table]), np.isnan(expected))
        assert np.array_equal((run[table] == 0).all(axis=1), (expected == 0).all(axis=1))
