"""Three optimizer steps of the trainer match golden vectors, for both networks and the published recipes."""
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
    """Return a trainer like that of `deeplab.train`, and a list of (losses, gradients) per batch.

    The trainer reads no data: tests give it batches. A batch appends its losses to the list, the second batch
    also the summaries of the gradients after the first.
    """
    config = Config(solver=solver)
    network, losses, recorded = NETWORKS[name], objective(config), []

    def recording(*arguments):
        before = gradients(model) if len(recorded) == 1 else None
        values = losses(*arguments)
        recorded.append(([loss.item() for loss in values.values()], before))
        return values

    unread = TrainingSet(["unread"] * solver.batch_size, "", "", 5, network.transform(config))
    optimizer, schedule = network.optimizer(model, config)
    run = RunConfig(str(output), "cpu")
    return Trainer(model, optimizer, schedule, recording, unread, solver, run), recorded


def rates(trainer: Trainer) -> list[float]:
    return [group["lr"] for group in trainer.optimizer.param_groups]


def batch(images: list[torch.Tensor], truth: np.ndarray) -> Batch:
    return Batch(torch.cat(images).numpy(), truth, ["unread"] * len(truth))


def train_affine(model):
    """Enable gradients of batch norm: the golden gradients include them, the optimizer does not use them."""
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


def assert_rows(computed, expected, tolerance, sum_tolerance=None):
    """Compare rows of `summary`, relative to the norm. The sums cancel and may have another tolerance.

    Rows of NaN or zeros must agree exactly.
    """
    assert computed.shape == expected.shape
    assert np.array_equal(np.isnan(computed), np.isnan(expected))
    zero = (expected == 0).all(axis=1)
    assert np.array_equal((computed == 0).all(axis=1), zero)
    rows = ~zero & ~np.isnan(expected).any(axis=1)
    error = np.abs(computed - expected)[rows] / expected[rows, 1:2]
    assert error[:, 1:].max() < tolerance
    assert error[:, 0].max() < (sum_tolerance or tolerance)


@pytest.mark.parametrize("loss", LOSSES)
def test_network_a_training_matches_golden(tmp_path, loss):
    expected = golden("a_train")
    model = fill_a(network_a.build_v2(5, (1, 1, 1, 1))).train()
    assert [name for name, _ in model.named_parameters()] == list(expected["names"])
    train_affine(model)
    solver = OptimConfig(
        iterations=6, batch_size=2, accumulate=2, learning_rate=2e-5, decay_every=2, loss=loss
    )
    start, lrs = parameters(model), []
    trainer, recorded = trainer_of("deeplab_v2", model, solver, tmp_path)
    for step in range(3):
        chunk = [
            batch(
                [input_a(f"dl:t{number}_{image}", 65, 65) for image in range(2)],
                labels(f"dl:tl{number}", (2, 65, 65), 5, block=8),
            )
            for number in (2 * step, 2 * step + 1)
        ]
        means = trainer.iterate(chunk)
        terms_of_two = [terms for terms, _ in recorded[-2:]]
        assert np.allclose(list(means.values()), np.mean(terms_of_two, axis=0), rtol=1e-6)
        lrs.append(rates(trainer))
        if step in (0, 2):
            now = parameters(model)
            assert_rows(summaries(now.values()), expected[f"{loss}_param_step{step + 1}"], 1e-5, 1e-3)
            moved = summaries(now[name] - start[name] for name in now)
            assert_rows(moved, expected[f"{loss}_delta_step{step + 1}"], 2e-3, 2e-2)
    assert_rows(recorded[1][1], expected[f"{loss}_grad_mb0"], 1e-4)
    assert np.allclose(lrs, expected["lrs"], rtol=1e-9, atol=0)
    assert relative([terms for terms, _ in recorded], expected[f"{loss}_losses"]) < 1e-5
    assert torch.equal(
        model.base.layer1.conv1.bn.running_mean, torch.from_numpy(expected[f"{loss}_stem_running_mean"])
    )
    with torch.no_grad():
        after = model.eval()(input_a("dl:plain0", 65, 65))
    assert relative(after, expected[f"{loss}_eval_after3"]) < 1e-2


def run_b(output, frozen, dtype):
    """Return the results of three steps of the narrow network, under the keys of b_train.npz."""
    model = fill_module(network_b.build_r38(5, width=4, freeze_bn=frozen)).to(dtype).train()
    for part in model.modules():
        if isinstance(part, nn.Dropout | nn.Dropout2d):
            part.p = 0
    train_affine(nn.ModuleList([model.bn_fov, model.bn_fov2]) if frozen else model)
    start, lrs = parameters(model), []
    solver = OptimConfig(iterations=5, batch_size=3, accumulate=1, learning_rate=1e-3, decay_every=1)
    trainer, recorded = trainer_of("deeplab_v1_r38", model, solver, output)
    body, weights, biases = (len(group["params"]) for group in network_a.parameter_groups(model))
    sizes = [body, 0, weights, biases]  # SEAM has an empty group for biases of the backbone
    run = {"names": list(start), "group_sizes": sizes}
    for step in range(3):
        images = [input_b(f"r38:t{step}_{image}", 41, 41) for image in range(3)]
        trainer.iterate([batch(images, labels(f"r38:tl{step}", (3, 41, 41), 5, block=8))])
        lrs.append(rates(trainer))
        if step == 0:
            run["grad0"] = gradients(model)
        now = parameters(model)
        run[f"delta_step{step + 1}"] = summaries(now[name] - start[name] for name in now)
    run |= {"losses": [terms[0] for terms, _ in recorded], "lrs": lrs}
    run["bn7_running_mean"] = model.backbone.bn7.running_mean
    run["bn_fov_running_var"] = model.bn_fov.running_var
    return run


@pytest.fixture(scope="module")
def expected_b():
    return golden("b_train")


def assert_common(run, expected, key):
    assert run["names"] == list(expected["names"])
    sizes = expected[f"{key}_group_sizes"]  # our optimizer has no empty group
    assert run["group_sizes"] == list(sizes)
    assert np.allclose(run["lrs"], expected["lrs"][:, sizes > 0], rtol=1e-9, atol=0)
    for statistic in ("bn7_running_mean", "bn_fov_running_var"):
        assert relative(run[statistic], expected[f"{key}_{statistic}"]) < 1e-4


def test_network_b_training_with_frozen_batch_norm_matches_golden(expected_b, tmp_path):
    run = run_b(tmp_path, frozen=True, dtype=torch.float32)
    assert_common(run, expected_b, "frozen")
    assert relative(run["losses"], expected_b["frozen_losses"]) < 1e-4
    for table in ("grad0", "delta_step1", "delta_step3"):
        assert_rows(run[table], expected_b[f"frozen_{table}"], 1e-3)


def test_network_b_training_with_live_batch_norm_matches_golden(expected_b, tmp_path):
    """In float64: one ReLU input is so close to 0 that float32 kernels differ in its sign."""
    run = run_b(tmp_path, frozen=False, dtype=torch.float64)
    assert_common(run, expected_b, "live")
    assert relative(run["losses"], expected_b["live_losses"]) < 1e-5
    assert_rows(run["grad0"], expected_b["live_grad0"], 1e-3)
    for step in (1, 3):
        assert_rows(run[f"delta_step{step}"], expected_b[f"live_delta_step{step}"], 1e-3, 5e-3)


def test_network_b_training_in_float32_matches_golden_in_part(expected_b, tmp_path):
    """The first loss and the zero rows do not depend on that ReLU input."""
    run = run_b(tmp_path, frozen=False, dtype=torch.float32)
    assert_common(run, expected_b, "live")
    assert relative(run["losses"][0], expected_b["live_losses"][0]) < 1e-4
    for table in ("grad0", "delta_step1", "delta_step3"):
        expected = expected_b[f"live_{table}"]
        assert np.array_equal(np.isnan(run[table]), np.isnan(expected))
        assert np.array_equal((run[table] == 0).all(axis=1), (expected == 0).all(axis=1))
