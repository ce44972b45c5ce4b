"""The training loop, on a tiny network whose dropout, batch norm and momentum must be resumed."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from segmentation import trainer as training_loop
from segmentation.checkpoints import FINAL, RESUME, numbered_checkpoints, write_checkpoint
from segmentation.config import OptimConfig, RunConfig
from segmentation.dataset import TrainingSet
from segmentation.distributed import WorkFailed, stopping
from segmentation.losses import cross_entropy
from segmentation.schedules import poly
from segmentation.trainer import Trainer
from segmentation.transforms import ScaleCrop
from tests import training_world

OPTIM = OptimConfig(iterations=12, batch_size=3, accumulate=2, learning_rate=0.01, seed=5)
RUN = RunConfig(device="cpu", workers=2, log_every=1, picture_every=4, validate_every=4, save_every=5,
                  resume_every=3, keep=0)  # fmt: skip
CROP = ScaleCrop(33, (0.75, 1.0))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    training_world.write_world(root)
    return root


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 21, 1)
    )


def losses(model, batch, global_count):
    logits = nn.functional.interpolate(model(batch.images / 100), batch.labels.shape[-2:])
    ce = cross_entropy(logits, batch.labels, global_count)
    return {"ce": ce, "small": 1e-3 * logits.float().square().mean()}


def probe(model):
    return {"Mean IoU": float(model(torch.ones(1, 3, 33, 33)).mean())}


def draw(model, batch):
    assert not model.training
    return {"input": np.uint8(batch.labels.shape[1] * np.ones((4, 5, 3)))}


def start(
    world: Path, output: Path, objective=losses, transform=CROP, validation=probe, optim=OPTIM, **run
) -> Trainer:
    """A trainer of the tiny network."""
    names = (world / "train.txt").read_text().split()
    folders = str(world / "JPEGImages"), str(world / "SegmentationClass")
    dataset = TrainingSet(names, *folders, 21, transform, optim.seed)
    model = network()
    groups = [
        {"params": [model[0].weight, model[4].weight], "weight_decay": 5e-4},
        {"params": [model[0].bias, model[4].bias], "lr": 20 * optim.learning_rate},
    ]
    sgd = torch.optim.SGD(groups, optim.learning_rate, momentum=0.9)
    run = replace(RUN, output=str(output), **run)
    return Trainer(
        model, sgd, lambda rate, done: rate * poly(done, optim.iterations), objective, dataset, optim, run,
        validation=validation, figures=draw,
    )  # fmt: skip


def resume(world: Path, output: Path, **arguments) -> Trainer:
    """A trainer that continues a run.

    Earlier logs are renamed so that they sort first: names of TensorBoard files contain only the second.
    """
    trainer = start(world, output, **arguments)
    logs = sorted((output / "logs").iterdir(), key=lambda file: file.stat().st_mtime_ns)
    for number, file in enumerate(logs):
        file.rename(file.with_name(f"events.out.tfevents.0{number}"))
    assert trainer.load_resume()
    return trainer


def state_of(file: Path) -> dict:
    return torch.load(file, weights_only=True)


def assert_same(found: dict, expected: dict):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Logged values as TensorBoard reads them: tag -> (step, value) of each scalar, or step of each image."""
    logs = EventAccumulator(str(folder / "logs"), {"scalars": 0, "images": 0}).Reload()
    found = {
        tag: [(event.step, event.value) for event in logs.Scalars(tag)] for tag in logs.Tags()["scalars"]
    }
    return found | {tag: [event.step for event in logs.Images(tag)] for tag in logs.Tags()["images"]}


@pytest.fixture(scope="module")
def uninterrupted(world, tmp_path_factory) -> Path:
    """The folder of a run that is never interrupted."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    trainer = start(world, folder)
    assert trainer.run()
    return folder


def test_finished_run_leaves_checkpoints_and_logs_only(uninterrupted):
    assert {file.name for file in uninterrupted.iterdir()} == {
        "checkpoint_5.pth", "checkpoint_10.pth", FINAL, "logs",
    }  # fmt: skip
    state = state_of(uninterrupted / FINAL)
    assert list(state) == list(network().state_dict())
    assert all(isinstance(value, torch.Tensor) and value.is_contiguous() for value in state.values())
    network().load_state_dict(state)


def test_log_contains_losses_rates_scores_and_figures(uninterrupted):
    found = events(uninterrupted)
    steps = list(range(1, 13))
    names = {"loss/train", "loss/ce", "loss/small", "lr/group_0", "lr/group_1", "images_per_second"}
    assert found.keys() == names | {"validation/Mean IoU", "input"}
    assert all([step for step, _ in found[name]] == steps for name in names)
    assert [step for step, _ in found["validation/Mean IoU"]] == found["input"] == [4, 8, 12]
    rates = [0.01 * poly(step - 1, 12) for step in steps]
    assert np.allclose([rate for _, rate in found["lr/group_0"]], rates)
    assert np.allclose([rate for _, rate in found["lr/group_1"]], np.multiply(rates, 20))
    total = np.add(*([value for _, value in found[f"loss/{name}"]] for name in ("ce", "small")))
    mean = [total[:step].mean() for step in steps]
    assert np.allclose([value for _, value in found["loss/train"]], mean)
    assert total[-3:].mean() < total[:3].mean() - 0.1  # the loss decreases


def test_images_per_second_counts_every_image_once(world, tmp_path, monkeypatch):
    seconds = iter(range(10_000))
    monkeypatch.setattr(training_loop.time, "monotonic", lambda: next(seconds))
    start(world, tmp_path).run()
    rates = [rate for _, rate in events(tmp_path)["images_per_second"]]
    assert rates == [5.0] * 12  # an iteration has batches of three and two images, and lasts one second


def test_logged_loss_is_the_mean_over_the_batches_of_an_iteration(world, tmp_path):
    batch_losses = []

    def recording(*arguments):
        found = losses(*arguments)
        batch_losses.append(sum(float(loss.detach()) for loss in found.values()))
        return found

    trainer = start(world, tmp_path, recording, optim=replace(OPTIM, iterations=3))
    trainer.run()
    assert np.allclose(trainer.recent, np.reshape(batch_losses, (3, 2)).mean(1), rtol=1e-6)


class Stop:
    """Function that sends this process a signal at its `at`-th call, then calls `function`."""

    def __init__(self, function, at: int, number: int = signal.SIGTERM):
        self.function, self.calls_left, self.number = function, at, number

    def __call__(self, *arguments):
        self.calls_left -= 1
        if self.calls_left == 0:
            os.kill(os.getpid(), self.number)
        return self.function(*arguments)


WHERE = {  # trainer argument, its function, call that sends the signal, range of iterations done
    "in the first reading": ("transform", CROP, 1, (0, 0)),
    "in reading": ("transform", CROP, 17, (0, 3)),  # images are read in advance
    "in the first iteration": ("objective", losses, 1, (1, 1)),
    "between batches": ("objective", losses, 16, (8, 8)),
    "in validation": ("validation", probe, 2, (8, 8)),
}


@pytest.mark.parametrize(
    "where, number", [*((where, signal.SIGTERM) for where in WHERE), ("between batches", signal.SIGINT)]
)
def test_resumed_run_equals_uninterrupted_run(world, uninterrupted, tmp_path, where, number):
    name, function, call, (least, most) = WHERE[where]
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    trainer = start(world, tmp_path, **{name: Stop(function, call, number)})
    assert trainer.run() is False
    assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
    assert least <= trainer.done <= most
    assert state_of(tmp_path / RESUME)["iteration"] == trainer.done
    torch.manual_seed(99)
    resumed = resume(world, tmp_path)
    assert resumed.done == trainer.done
    assert resumed.run() is True
    assert not (tmp_path / RESUME).exists()
    for file in ("checkpoint_5.pth", "checkpoint_10.pth", FINAL):
        assert_same(state_of(tmp_path / file), state_of(uninterrupted / file))
    found, expected = events(tmp_path), events(uninterrupted)
    for tag in expected:
        if tag != "images_per_second":
            assert found[tag] == expected[tag], tag


def test_weights_and_momentum_keep_their_memory_layout_when_resumed(world, tmp_path):
    for layout in (True, False):
        finals = []
        for name, call in (("whole", 0), ("stopped", 9)):
            folder = tmp_path / f"{name}_{layout}"
            trainer = start(world, folder, Stop(losses, call), channels_last=layout)
            if not trainer.run():
                trainer = resume(world, folder, channels_last=layout)
                momentum = trainer.optimizer.state[trainer.model[0].weight]["momentum_buffer"]
                assert momentum.is_contiguous(memory_format=torch.channels_last) == layout
                assert trainer.model[0].weight.is_contiguous(memory_format=torch.channels_last) == layout
                assert trainer.run()
            finals.append(state_of(folder / FINAL))
        assert_same(*finals)


def test_killed_run_repeats_what_was_lost(world, uninterrupted, tmp_path):
    """An interrupted validation, and the iterations after the last resume file, are run again."""

    class Killed(BaseException):
        pass

    def kill(model):
        raise Killed

    with pytest.raises(Killed):
        start(world, tmp_path, validation=kill, resume_every=4).run()
    resumed = resume(world, tmp_path)
    assert resumed.done == 4
    calls = []

    def killed_at_8(*arguments):
        calls.append(None)
        if len(calls) == 2 * (8 - 4):
            raise Killed
        return losses(*arguments)

    resumed.objective = killed_at_8
    with pytest.raises(Killed):
        resumed.run()
    assert (tmp_path / "checkpoint_5.pth").is_file()
    last = resume(world, tmp_path)
    assert last.done == 6 and last.run()  # iteration 7 was logged before, and is logged again
    assert_same(state_of(tmp_path / FINAL), state_of(uninterrupted / FINAL))
    found, expected = events(tmp_path), events(uninterrupted)
    assert all(found[tag] == expected[tag] for tag in expected if tag != "images_per_second")


def test_second_sigint_interrupts_at_once_unless_twice(world, tmp_path):
    def interrupt(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return losses(*arguments)

    with pytest.raises(KeyboardInterrupt):
        start(world, tmp_path, interrupt).run()
    with stopping(twice=True) as stop:  # under torchrun one Ctrl-C arrives twice
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.is_set()


@pytest.mark.parametrize("damage", ["cut", "other file", "other network", "nothing"])
def test_damaged_resume_file_raises_one_line(world, tmp_path, damage):
    file = tmp_path / RESUME
    trainer = start(world, tmp_path)
    trainer.save_resume()
    content = file.read_bytes()
    if damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "other file":
        write_checkpoint(trainer.model, file)
    elif damage == "other network":
        state = state_of(file)
        del state["model"]["0.bias"]
        torch.save(state, file)
    else:
        file.write_bytes(b"")
    message = f"{RESUME} is damaged or belongs to another network: remove it"
    with pytest.raises(ValueError, match=message) as caught:
        start(world, tmp_path).load_resume()
    assert "\n" not in str(caught.value)
    assert not start(world, tmp_path / "elsewhere").load_resume()


@pytest.mark.parametrize(
    "path, value, message",
    [
        (("model", "0.bias"), float("nan"), r"has NaN or infinity in model\.0\.bias: remove it"),
        (("model", "1.running_var"), float("inf"), r"has NaN or infinity in model\.1\.running_var"),
        (("optimizer", "state", 0, "momentum_buffer"), float("inf"), r"has NaN or infinity in optimizer\.st"),
        (("iteration",), -1, "is damaged"),
        (("iteration",), "3", "is damaged"),
        (("recent_losses",), ["x"], "is damaged"),
    ],
)
def test_invalid_numbers_in_a_resume_file_raise(world, tmp_path, path, value, message):
    trainer = start(world, tmp_path, optim=replace(OPTIM, iterations=1), validate_every=0)
    trainer.run()
    trainer.save_resume()
    state = state_of(tmp_path / RESUME)
    *parents, last = path
    inner = state
    for key in parents:
        inner = inner[key]
    if isinstance(inner[last], torch.Tensor):
        inner[last].fill_(value)
    else:
        inner[last] = value
    torch.save(state, tmp_path / RESUME)
    with pytest.raises(ValueError, match=rf"{RESUME} {message}"):
        start(world, tmp_path).load_resume()


def test_resume_file_that_declares_too_much_raises(world, tmp_path):
    trainer = start(world, tmp_path)
    trainer.save_resume()
    state = state_of(tmp_path / RESUME)
    state["model"]["0.bias"] = torch.zeros(1).expand(2**32)
    torch.save(state, tmp_path / RESUME)
    with pytest.raises(ValueError, match="is damaged or belongs to another network"):
        start(world, tmp_path).load_resume()


def test_nan_loss_stops_before_the_weights_change(world, tmp_path):
    calls = []

    def nan_in_call_15(*arguments):
        calls.append(None)
        found = losses(*arguments)
        return found | {"ce": found["ce"] * float("nan")} if len(calls) == 15 else found

    trainer = start(world, tmp_path, nan_in_call_15)
    with pytest.raises(WorkFailed) as caught:
        trainer.run()
    message = str(caught.value)
    assert message.startswith("training stopped: the loss of iteration 8 is nan; its images: ")
    names = [trainer.dataset.names[draw.index] for batch in (14, 15) for draw in trainer.order.batch(batch)]
    checkpoint = tmp_path / "checkpoint_5.pth"
    assert f"its images: {', '.join(names)}; last good checkpoint: {checkpoint};" in message
    assert [file.name for file in numbered_checkpoints(tmp_path)] == ["checkpoint_5.pth"]
    state = state_of(tmp_path / RESUME)
    assert state["iteration"] == 6 and all(value.isfinite().all() for value in state["model"].values())
    assert events(tmp_path)["loss/train"][-1][0] == 7  # the iterations before it are in the log


@pytest.mark.parametrize("what", ["to save", "to stop"])
def test_non_finite_weights_are_not_saved(world, tmp_path, what):
    """A finite loss can have an infinite gradient: the square root at 0."""
    calls = []

    def square_root(model, *arguments):
        calls.append(None)
        found = losses(model, *arguments)
        at = {"to save": 10, "to stop": 8}[what]  # a checkpoint is written after five iterations
        if len(calls) == at:
            found["root"] = (model[4].bias * 0).abs().sum().sqrt()
            if what == "to stop":
                os.kill(os.getpid(), signal.SIGTERM)
        return found | {"root": found.get("root", found["small"] * 0)}

    with pytest.raises(WorkFailed, match=r"after iteration [45] the weights are not finite; last good"):
        resume_every = 2 if what == "to save" else 3
        start(world, tmp_path, square_root, validate_every=0, resume_every=resume_every).run()
    assert numbered_checkpoints(tmp_path) == []
    state = state_of(tmp_path / RESUME)
    assert state["iteration"] < 5 and all(value.isfinite().all() for value in state["model"].values())


def test_unreadable_file_stops_training_and_keeps_finished_iterations(world, uninterrupted, tmp_path):
    names = (world / "train.txt").read_text().split()
    calls = []

    def fail_in_call_38(image, mask, draw):
        calls.append(None)
        if len(calls) == 38:
            raise ValueError("mask of image_x cannot be read")
        return CROP(image, mask, draw)

    trainer = start(world, tmp_path, transform=fail_in_call_38, workers=1)
    with pytest.raises(WorkFailed, match=r"^training stopped: mask of image_x cannot be read$"):
        trainer.run()
    assert trainer.done == 37 // len(names) == 7 == state_of(tmp_path / RESUME)["iteration"]
    assert resume(world, tmp_path).run()
    assert_same(state_of(tmp_path / FINAL), state_of(uninterrupted / FINAL))


def test_keep_limits_the_number_of_checkpoints(world, tmp_path):
    start(world, tmp_path, save_every=2, keep=2, resume_every=0, validate_every=0, picture_every=0).run()
    assert [file.name for file in numbered_checkpoints(tmp_path)] == ["checkpoint_8.pth", "checkpoint_10.pth"]
    assert (tmp_path / FINAL).is_file() and not (tmp_path / RESUME).exists()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_close_to_float32_and_can_be_resumed(world, uninterrupted, tmp_path, precision):
    """Products are in half precision, weights in float32. The state of the gradient scaler is resumed."""
    dtypes = set()

    def recording(model, *arguments):
        handle = model[4].register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
        found = losses(model, *arguments)
        handle.remove()
        return found

    whole = start(world, tmp_path / "whole", recording, precision=precision)
    assert whole.run() and dtypes == {getattr(torch, {"bf16": "bfloat16", "fp16": "float16"}[precision])}
    expected = state_of(tmp_path / "whole" / FINAL)
    assert {value.dtype for value in expected.values()} == {torch.float32, torch.int64}
    plain = state_of(uninterrupted / FINAL)
    change = max(float((plain[key] - network().state_dict()[key]).abs().max()) for key in plain)
    difference = max(float((plain[key] - expected[key]).abs().max()) for key in plain)
    assert 0 < difference < 0.2 * change
    stopped = start(world, tmp_path / "stopped", Stop(losses, 9), precision=precision)
    assert not stopped.run()
    resumed = resume(world, tmp_path / "stopped", precision=precision)
    assert resumed.scaler.is_enabled() == (precision == "fp16")
    assert resumed.scaler.state_dict() == stopped.scaler.state_dict()
    assert resumed.run()
    assert_same(state_of(tmp_path / "stopped" / FINAL), expected)


INVALID = {
    "precision": ({"precision": "fp8"}, {}, "precision must be one of fp32, tf32, bf16, fp16, got 'fp8'"),
    "iterations": ({}, {"iterations": 0}, "solver.iterations must be a whole number, 1 or more, got 0"),
    "workers": ({"workers": 0}, {}, "run.workers must be a whole number, 1 or more, got 0"),
    "seed": ({}, {"seed": -1}, "solver.seed must be a whole number from 0"),
    "batch_size": ({}, {"batch_size": 0}, "solver.batch_size must be a whole number, 1 or more, got 0"),
    "drop_last": ({}, {"batch_size": 6, "drop_last": True}, "5 images do not fill one batch of 6"),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_settings_raise_before_files_are_written(world, tmp_path, case):
    run, optim, message = INVALID[case]
    with pytest.raises(ValueError, match=message):
        start(world, tmp_path, optim=replace(OPTIM, **optim), **run)
    assert not list(tmp_path.iterdir())
