"""Ranks that train one network: their communication, and results equal to those of one process."""


import numpy as np
import pytest
import torch

from segmentation.dataset import Order
from segmentation.distributed import World, gather, local_rank_and_world, rank_and_world, together
from segmentation.losses import LOSSES
from segmentation.masks import read_mask
from tests import processes, training_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    training_world.write_world(root)
    return root


@pytest.fixture(scope="module")
def on_two(world, tmp_path_factory):
    """Results of training on two ranks: for each rank a dict (loss, whole) -> (parameters, losses)."""
    cases = [*((loss, True) for loss in LOSSES), ("ce", False)]
    started = processes.ranks(training_world.train_cases, world, tmp_path_factory.mktemp("two"), cases)
    ended = [process.end() for process in started]
    assert all(code == 0 for code, *_ in ended), ended
    return [dict(zip(cases, returned, strict=True)) for _, _, returned in ended]


def largest_difference(found, expected):
    return max(np.abs(found[name] - expected[name]).max() for name in expected)


def test_training_data_covers_the_special_cases_of_ranks(world):
    """Batches in which a rank has no image, no labeled pixel, or few labeled pixels."""
    names = (world / "train.txt").read_text().split()
    masks = [read_mask(world / "SegmentationClass" / f"{name}.png") for name in names]
    labeled = [(mask != 255).mean() for mask in masks]
    order = Order(len(names), 4, 0)
    batches = [[draw.index for draw in order.batch(number)] for number in range(40)]
    found = [[sum(labeled[index] for index in batch[rank::2]) for rank in (0, 1)] for batch in batches]
    assert [0, 0] in found
    assert any(not batch[1::2] and part[0] > 0 for batch, part in zip(batches, found, strict=True))
    assert any(batch[1::2] and max(part) > 0 == min(part) for batch, part in zip(batches, found, strict=True))
    assert any(0 < min(part) < 0.2 for part in found)


@pytest.mark.parametrize("loss", LOSSES)
def test_two_ranks_train_the_same_network_as_one_process(world, on_two, tmp_path, loss):
    expected, losses = training_world.train_a(world, tmp_path, loss, whole=True)
    for parameters, logged in (rank[loss, True] for rank in on_two):
        assert largest_difference(parameters, expected) < 1e-9
        assert np.abs(np.subtract(logged, losses)).max() < 1e-9
    assert len({round(value, 6) for value in losses}) == 20  # the loss changes in every iteration

    if loss == "ce":  # the mean of the ranks' means gives another network
        assert largest_difference(on_two[0]["ce", False][0], expected) > 1e-4


def test_world_exchanges_values_between_ranks():
    ended = [process.end() for process in processes.ranks(training_world.exchange)]
    assert [code for code, *_ in ended] == [0, 0]
    for rank, (_, _, found) in enumerate(ended):
        assert found == {
            "any": [True, False],
            "mean": [0.5, 5.0],
            "same": [0.0, 0.0],
            "given": [float(rank), 10.0 * rank],  # the reduction does not change its argument
        }


def test_one_process_exchanges_nothing():
    world = World(torch.device("cpu"))
    values = torch.tensor([1.0, 2.0])
    assert world.any(True, False) == [True, False]
    assert torch.equal(world.mean(values), values)
    with pytest.raises(ValueError, match="wrong"), together():
        raise ValueError("wrong")


def test_error_on_one_rank_is_printed_once():
    ended = [process.end() for process in processes.ranks(training_world.fail_on_rank_1)]
    (code, errors, _), (other_code, other_errors, _) = ended
    assert (code, other_code) == (2, 1)
    assert errors == "error: rank 1 found nothing\n" and other_errors == ""


def test_nan_loss_on_one_rank_stops_all_ranks(world, tmp_path):
    started = processes.ranks(training_world.nan_on_rank_1, world, tmp_path)
    (code, errors, _), (other_code, other_errors, _) = [process.end() for process in started]
    assert (code, other_code, other_errors) == (1, 1, "")
    order, names = Order(5, 4, 0), (world / "train.txt").read_text().split()
    draws = [draw for rank in (0, 1) for number in (4, 5) for draw in order.batch(number)[rank::2]]
    images = ", ".join(names[draw.index] for draw in draws)
    assert errors == (
        f"error: training stopped: the loss of iteration 3 is nan; its images: {images}; last good "
        f"checkpoint: {tmp_path / 'checkpoint_2.pth'}; a lower solver.learning_rate may help\n"
    )
    assert {file.name for file in tmp_path.glob("*.p*")} == {"checkpoint_2.pth", "resume.pt"}
    state = torch.load(tmp_path / "resume.pt", weights_only=True)
    assert state["iteration"] == 2 and all(value.isfinite().all() for value in state["model"].values())


def test_all_ranks_validate_the_saved_network(world, tmp_path):
    """Batch norm statistics differ between ranks. Rank 0's are saved, so all ranks validate with them."""
    started = processes.ranks(training_world.statistics_validated, world, tmp_path)
    (before, found), (_, other) = [process.end()[2] for process in started]
    assert not np.array_equal(before, found) and np.array_equal(found, other)
    state = torch.load(tmp_path / "checkpoint_final.pth", weights_only=True)
    saved = [value.numpy().ravel() for key, value in state.items() if "running" in key or "tracked" in key]
    assert np.array_equal(np.concatenate(saved), found)


def test_killed_rank_ends_the_other_rank_with_an_error():
    ended = [process.end() for process in processes.ranks(training_world.lose_rank_1)]
    (code, errors, _), (killed_code, *_) = ended
    assert (code, killed_code) == (1, 9)
    assert errors == "error: another process of torchrun died: run the command again to continue\n"


def environment(monkeypatch, text: str) -> None:
    """Set only these of torchrun's variables; `text` is such as "RANK=1 WORLD_SIZE=2"."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for part in text.split():
        monkeypatch.setenv(*part.split("="))


@pytest.mark.parametrize(
    "text, ranks",
    [
        ("", [(0, 1), (0, 1)]),
        ("RANK=1", [(0, 1), (0, 1)]),
        ("RANK=x LOCAL_RANK=7", [(0, 1), (0, 1)]),
        ("WORLD_SIZE=4 LOCAL_WORLD_SIZE=x", [(0, 1), (0, 1)]),
        ("RANK= WORLD_SIZE=", [(0, 1), (0, 1)]),
        ("RANK=0 WORLD_SIZE=1 LOCAL_RANK=3", [(0, 1), (0, 1)]),
        ("RANK=5 WORLD_SIZE=8 LOCAL_RANK=1 LOCAL_WORLD_SIZE=4", [(5, 8), (1, 4)]),
        ("RANK=5 WORLD_SIZE=8 LOCAL_RANK=1", [(5, 8), (1, 1)]),  # launchers other than torchrun
        ("RANK=5 WORLD_SIZE=8", [(5, 8), (0, 1)]),
    ],
)
def test_ranks_are_those_of_torchrun(monkeypatch, text, ranks):
    environment(monkeypatch, text)
    assert [rank_and_world(), local_rank_and_world()] == ranks


@pytest.mark.parametrize(
    "text, message",
    [
        ("RANK=1 WORLD_SIZE=1", "RANK='1' and WORLD_SIZE='1' in the environment: a rank is a number from 0"),
        ("RANK=0 WORLD_SIZE=0", "WORLD_SIZE='0'"),
        ("RANK=-1 WORLD_SIZE=2", "RANK='-1'"),
        ("RANK=x WORLD_SIZE=2", "RANK='x'"),
        ("RANK=0 WORLD_SIZE=2.0", "WORLD_SIZE='2.0'"),
        ("RANK=0 WORLD_SIZE=2 LOCAL_RANK=x", "LOCAL_RANK='x'"),
        ("RANK=0 WORLD_SIZE=2 LOCAL_RANK=2 LOCAL_WORLD_SIZE=2", "LOCAL_RANK='2' and LOCAL_WORLD_SIZE='2'"),
        ("RANK=0 WORLD_SIZE=2 LOCAL_WORLD_SIZE=0", "LOCAL_WORLD_SIZE='0'"),
        ("RANK=0 WORLD_SIZE=2", "MASTER_ADDR='' and MASTER_PORT=''"),
        ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=x", "MASTER_PORT='x'"),
    ],
)
def test_invalid_ranks_are_refused(monkeypatch, text, message):
    environment(monkeypatch, text)
    with pytest.raises(ValueError, match=message):
        gather(local_rank_and_world())
