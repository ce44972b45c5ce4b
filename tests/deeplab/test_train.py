"""python -m deeplab.train: user errors, interruptions, two ranks, files in the run folder."""

import hashlib
import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from deeplab import model as network_a
from deeplab import resnet38, train
from deeplab.config import Config
from deeplab.recipe import RECIPE
from segmentation.checkpoints import FINAL, RESUME
from tests import training_world
from tests.processes import Command, Process, ranks, torchrun
from training import config as configs
from training import train as loop

CONFIG = """
data: {{benchmark: shapes, root: {root}, train_split: {root}/train.txt, val_split: {root}/val.txt}}
model: {{blocks: [1, 1, 1, 1], width: 4, rates: [1, 2], scales: [0.5]}}
augment: {{crop: 33, scales: [0.75, 1.0]}}
solver: {{iterations: 30, batch_size: 4, accumulate: 2, decay_every: 1, learning_rate: 1e-3}}
run: {{device: cpu, workers: 2, log_every: 3, picture_every: 15, validate_every: 15, save_every: 10,
       resume_every: 1}}
"""
R38 = ["model.network=deeplab_v1_r38", "model.rates=[2]", "model.width=2", "model.scales=[0.5, 0.75]",
       "augment.scales=[0.5, 0.75, 1.0, 1.25, 1.5]"]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    training_world.write_world(root)
    (root / "tiny.yaml").write_text(CONFIG.format(root=root))
    return root


def words(world: Path, output: Path, *more) -> list[str]:
    return ["--config", str(world / "tiny.yaml"), f"run.output={output}", *map(str, more)]


def run(world: Path, output: Path, *more, count: int = 1) -> list[tuple[int, str]]:
    """Return (exit code, output without the printed configuration) of each of `count` ranks."""
    arguments = words(world, output, *more)
    if count == 1:
        started = [Process(training_world.trained, arguments)]
    else:
        started = ranks(training_world.trained, arguments, count=count)
    return [(code, without_config(printed)) for code, printed, _ in (process.end() for process in started)]


def without_config(printed: str) -> str:
    return re.sub(r"^data:\n.*?\n\n", "", printed, flags=re.DOTALL)


def state_of(file: Path) -> dict[str, torch.Tensor]:
    return torch.load(file, weights_only=True)


def assert_same(folder: Path, expected: Path):
    for file in ("checkpoint_10.pth", "checkpoint_20.pth", FINAL):
        states = state_of(folder / file), state_of(expected / file)
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(value, states[1][key]) for key, value in states[0].items()), file


def content(folder: Path) -> str:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return hashlib.sha256(b"".join(str(file).encode() + file.read_bytes() for file in files)).hexdigest()


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    logs = EventAccumulator(str(folder / "logs"), {"scalars": 0, "images": 0}).Reload()
    return {
        tag: [(event.step, event.value) for event in logs.Scalars(tag)] for tag in logs.Tags()["scalars"]
    }


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory) -> Path:
    """Folder of a run without interruption."""
    folder, before = tmp_path_factory.mktemp("undisturbed"), content(world)
    ((code, printed),) = run(world, folder)
    assert code == 0 and printed.splitlines()[-1] == f"trained 30 iterations: {folder / FINAL}", printed
    assert content(world) == before  # training does not change images or masks
    return folder


@pytest.fixture(scope="module")
def undisturbed_on_two(world, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert [code for code, _ in run(world, folder, count=2)] == [0, 0]
    return folder


def test_run_folder_contains_checkpoints_settings_and_logs(world, undisturbed):
    assert {file.name for file in undisturbed.iterdir()} == {
        "checkpoint_10.pth", "checkpoint_20.pth", FINAL, "config.yaml", "settings.json", "logs",
    }  # fmt: skip
    network_a.build_v2(13, (1, 1, 1, 1), (1, 2), 4, (0.5,)).load_state_dict(state_of(undisturbed / FINAL))
    config = configs.read(Config, undisturbed / "config.yaml")
    assert config == configs.read(Config, world / "tiny.yaml", [f"run.output={undisturbed}"])
    record = json.loads((undisturbed / "settings.json").read_text())
    assert record["step"] == "deeplab.train" and record["settings"]["solver.learning_rate"] == 1e-3
    logs = EventAccumulator(str(undisturbed / "logs"), {"images": 0}).Reload()
    assert {"validation/Mean IoU", "validation/Pixel Accuracy", "lr/group_2", "loss/output_2"} <= {
        *logs.Tags()["scalars"]
    }
    figures = logs.Images("input_label_prediction")
    assert [figure.step for figure in figures] == [15, 30]
    assert (figures[0].width, figures[0].height % 33) == (3 * 33, 0)


def test_two_ranks_train_the_same_network_as_one(undisturbed, undisturbed_on_two):
    """Weights are equal up to rounding, and scores are equal."""
    one, two = (state_of(folder / FINAL) for folder in (undisturbed, undisturbed_on_two))
    assert max(float((one[key] - two[key]).abs().max()) for key in one if "tracked" not in key) < 1e-5
    one, two = scalars(undisturbed), scalars(undisturbed_on_two)
    for tag in ("validation/Mean IoU", "validation/Pixel Accuracy", "loss/train", "lr/group_0"):
        assert [step for step, _ in one[tag]] == [step for step, _ in two[tag]]
        assert np.allclose(*([value for _, value in logged[tag]] for logged in (one, two)), atol=1e-3), tag


def saved(folder: Path) -> int:
    """Return the number of iterations in the resume file."""
    return state_of(folder / RESUME)["iteration"] if (folder / RESUME).is_file() else 0


def test_killed_and_stopped_run_resumes_to_the_same_weights(world, undisturbed, tmp_path):
    command = Command("-m", "deeplab.train", *words(world, tmp_path))
    command.until(lambda: saved(tmp_path) >= 10)
    command.signal_group(signal.SIGKILL)
    assert command.end()[0] == -signal.SIGKILL
    killed_at = saved(tmp_path)
    again = Process(training_world.trained, words(world, tmp_path, "--resume"))
    again.until(lambda: saved(tmp_path) > killed_at)
    again.signal(signal.SIGTERM)
    code, printed, _ = again.end()
    stopped_at = saved(tmp_path)
    assert 10 <= killed_at < stopped_at < 30
    printed = without_config(printed)
    lines = [line for line in printed.splitlines() if not re.match("iteration [0-9]+: Mean IoU", line)]
    assert code == 0
    assert lines == [f"stopped after iteration {stopped_at}: the same command with --resume continues"]
    ((code, printed),) = run(world, tmp_path, "--resume")
    assert code == 0 and printed.splitlines()[-1] == f"trained 30 iterations: {tmp_path / FINAL}"
    assert_same(tmp_path, undisturbed)
    steps = [step for step, _ in scalars(tmp_path)["loss/train"]]
    assert steps == list(range(3, 31, 3))  # no step is missing or logged twice


def test_signals_to_torchrun_or_one_rank_stop_all_ranks(world, undisturbed_on_two, tmp_path):
    """torchrun's process group gets SIGTERM, as from a terminal or a batch system. Then a single rank gets a
    signal: all ranks stop after the same iteration. All runs can be resumed.
    """
    command = torchrun("-m", "deeplab.train", *words(world, tmp_path))
    command.until(lambda: saved(tmp_path) >= 1)
    command.signal_group(signal.SIGTERM)
    printed, at = without_config(command.end()[1]), saved(tmp_path)
    assert 1 <= at < 30
    assert printed.count(f"stopped after iteration {at}: the same command with --resume continues") == 1
    assert "deeplab.train" not in re.sub(".*torch.distributed.*", "", printed)  # no traceback of ours
    for number, rank, codes in (
        (signal.SIGKILL, 1, (1, -signal.SIGKILL)), (signal.SIGTERM, 1, (0, 0)), (signal.SIGINT, 0, (0, 0))
    ):  # fmt: skip
        before = at
        started = ranks(training_world.trained, words(world, tmp_path, "--resume"))
        started[0].until(lambda least=before: saved(tmp_path) > least)
        started[rank].signal(number)
        (code, printed, _), (other, silent, _) = (process.end() for process in started)
        at = saved(tmp_path)
        assert (code, other, silent) == (*codes, "") and before < at < 30
        assert code or printed.splitlines()[-1].startswith(f"stopped after iteration {at}: ")
    assert [code for code, _ in run(world, tmp_path, "--resume", count=2)] == [0, 0]
    assert_same(tmp_path, undisturbed_on_two)


def test_network_b_resumes_to_the_same_weights(world, tmp_path, monkeypatch):
    """Network B has live batch norm and dropout; the run is stopped during validation."""
    calls = []
    infer = loop.infer

    def stopping_infer(*arguments):
        calls.append(None)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return infer(*arguments)

    finals = []
    for name, function in (("whole", infer), ("stopped", stopping_infer)):
        monkeypatch.setattr(loop, "infer", function)
        arguments = words(world, tmp_path / name, *R38, "solver.iterations=8", "run.validate_every=6")
        assert train.main(arguments) == 0
        if name == "stopped":
            assert state_of(tmp_path / name / RESUME)["iteration"] == 6
            assert train.main([*arguments, "--resume"]) == 0
        finals.append(state_of(tmp_path / name / FINAL))
    assert all(torch.equal(value, finals[1][key]) for key, value in finals[0].items())
    resnet38.build_r38(13, (1, 1, 1, 1), 2).load_state_dict(finals[0])
    assert len(calls) == 3  # the validation was finished before the stop, and is not repeated


def error_of(capsys, arguments) -> tuple[int, str]:
    """Return the exit code and stderr of the command, run in this process."""
    with pytest.raises(SystemExit) as caught:
        training_world.trained(arguments)
    return caught.value.code, capsys.readouterr().err


def test_folder_of_a_run_requires_resume_or_overwrite(world, undisturbed, tmp_path, capsys):
    before = content(undisturbed)
    code, message = error_of(capsys, words(world, undisturbed))
    assert code == 2 and "contains checkpoint_10.pth: give --resume to continue that run, --overw" in message
    code, message = error_of(capsys, words(world, undisturbed, "--resume", "solver.learning_rate=1e-4"))
    assert code == 2 and "solver.learning_rate (was 0.001, now 0.0001);" in message
    assert "momentum" not in message
    code, message = error_of(capsys, words(world, undisturbed, "--overwrite", "run.precision=fp8"))
    assert code == 2 and "precision must be one of" in message
    code, message = error_of(capsys, words(world, undisturbed, "--overwrite", "model.init=absent.pth"))
    assert code == 2 and "absent.pth does not exist" in message
    with pytest.raises(SystemExit) as caught:
        training_world.trained(words(world, undisturbed, "--overwrite", "--resume"))
    assert caught.value.code == 2 and content(undisturbed) == before
    capsys.readouterr()
    assert train.main(words(world, undisturbed, "--resume", "run.keep=7")) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"training is complete: {undisturbed / FINAL}"
    assert content(undisturbed) == before
    code, message = error_of(capsys, words(world, world / "SegmentationClass"))
    assert code == 2 and "is the folder of the images or masks" in message


def test_overwrite_starts_from_scratch(world, tmp_path, capsys):
    short = ["solver.iterations=2", "run.log_every=1", "run.validate_every=0"]
    assert train.main(words(world, tmp_path, *short, "--resume")) == 0
    assert "nothing to resume" in capsys.readouterr().err
    first = state_of(tmp_path / FINAL)
    assert train.main(words(world, tmp_path, *short, "solver.seed=1", "--overwrite")) == 0
    assert not torch.equal(state_of(tmp_path / FINAL)["base.aspp.c0.weight"], first["base.aspp.c0.weight"])
    assert [step for step, _ in scalars(tmp_path)["loss/train"]] == [1, 2]
    assert len(list((tmp_path / "logs").iterdir())) == 1
    (tmp_path / FINAL).rename(tmp_path / "checkpoint_1.pth")
    (tmp_path / RESUME).write_bytes(b"damaged")
    flags = words(world, tmp_path, "solver.iterations=2", "solver.seed=1", "--resume")
    code, message = error_of(capsys, flags)
    assert code == 2 and "damaged or belongs to another network: remove it to start from scratch" in message


def copied(world: Path, tmp_path: Path) -> list[str]:
    """Copy the masks and images, so that tests can damage them; return the words that select the copies."""
    for folder in ("JPEGImages", "SegmentationClass"):
        (tmp_path / folder).mkdir()
        for file in (world / folder).iterdir():
            (tmp_path / folder / file.name).write_bytes(file.read_bytes())
    return [f"data.image_dir={tmp_path / 'JPEGImages'}", f"data.label_dir={tmp_path / 'SegmentationClass'}"]


def mask(pixels: np.ndarray):
    return lambda root: Image.fromarray(pixels).save(root / "SegmentationClass" / "image_2.png")


def cut(root: Path):
    file = root / "JPEGImages" / "image_2.png"
    file.write_bytes(file.read_bytes()[:1500])


def missing(folder: str):
    return lambda root: (root / folder / "image_2.png").unlink()


def empty_split(root: Path):
    (root / "empty.txt").write_text("\n")


def every_mask(pixels: np.ndarray):
    def damage(root: Path):
        for file in (root / "SegmentationClass").iterdir():
            Image.fromarray(pixels).save(file)

    return damage


TWO_VALUES = np.where(np.arange(52) < 20, 255, np.zeros((40, 1))).astype(np.uint8)
ERRORS = {  # damage to the files, more words, exit code, message
    "size": (mask(np.zeros((40, 51), np.uint8)), [], 1,
             r"image_2.png is \(40, 51\) but its image is .*\(40, 52\)"),
    "class": (mask(np.full((40, 52), 13, np.uint8)), [], 1, "image_2.png has the value 13.*13 class indices"),
    "16 bits": (mask(np.zeros((40, 52), np.uint16)), [], 1, "image_2.png has mode I;16"),
    "RGB": (mask(np.zeros((40, 52, 3), np.uint8)), [], 1, "image_2.png has mode RGB"),
    "cut image": (cut, [], 1, "image_2.png cannot be read"),
    "no mask": (missing("SegmentationClass"), [], 2, "SegmentationClass/image_2.png .*does not exist"),
    "no image": (missing("JPEGImages"), [], 2, "no image image_2 "),
    "empty split": (empty_split, ["data.train_split={root}/empty.txt"], 2, "empty.txt lists no images"),
    "no split": (None, ["data.train_split=absent.txt"], 2, "absent.txt does not exist"),
    "0 and 255": (every_mask(TWO_VALUES), [], 2, "no pixel of a class: .* are 0, 255, .*convert_masks"),
    "0 and 254": (every_mask(TWO_VALUES // 255 * 254), [], 2, "no pixel of a class: .* are 0, 254"),
    "all RGB": (every_mask(np.zeros((40, 52, 3), np.uint8)), [], 2, "mode RGB, .*convert_masks"),
    "no val mask": (None, ["data.val_label_dir={root}"], 2, "image_5.png .*does not exist"),
    "no benchmark": (None, ["data.benchmark=voc99"], 2, "no benchmark 'voc99'"),
    "unknown key": (None, ["solver.rate=1"], 2, "solver.rate=1: .*rate"),
    "type": (None, ["solver.iterations=x"], 2, "solver.iterations=x: .*'x'"),
    "network": (None, ["model.network=vgg"], 2, "model.network must be one of deeplab_v2.*'vgg'"),
    "loss": (None, ["solver.loss=focal"], 2, "solver.loss must be one of ce.*'focal'"),
    "precision": (None, ["run.precision=fp8"], 2, "precision must be one of fp32.*'fp8'"),
    "device": (None, ["run.device=tpu"], 2, "tpu"),
    "blocks": (None, ["model.blocks=[1]"], 2, "blocks must be four"),
    "crop": (None, ["augment.crop=0"], 2, "crop"),
    "scales": (None, ["augment.scales=[]"], 2, "scales"),
    "base": (None, ["augment.base=0"], 2, "augment.base must be a whole number, 1 or more, got 0"),
    "scale range": (None, [*R38, "augment.scale_range=[1]"], 2, "scale_range must be two numbers"),
    "jitter": (None, [*R38, "augment.jitter=-1"], 2, "jitter must be a whole number, 0 or more, got -1"),
    "learning rate": (None, ["solver.learning_rate=-1"], 2, "learning_rate must be .* 0 or more, got -1"),
    "init of another depth": ("init", ["model.init={root}/init.pth"], 2, "init.pth.*in common.*same depth"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_user_error_is_one_line(world, tmp_path, capsys, case):
    damage, more, expected, sentence = ERRORS[case]
    root, output = tmp_path / "data", tmp_path / "run"
    root.mkdir()
    if damage == "init":
        torch.save(network_a.build_v2(13, (1, 1, 9, 1), (1, 2), 4).state_dict(), root / "init.pth")
    elif damage:
        more = [*more, *copied(world, root)]
        damage(root)
    more = [word.format(root=root) for word in more]
    before = content(root)
    code, message = error_of(capsys, words(world, output, *more))
    assert code == expected, message
    assert re.fullmatch(f"error: .*{sentence}.*\n", message), message
    assert content(root) == before
    assert (expected == 2) == (not output.exists())


def test_validation_masks_without_a_class_are_an_error(world, tmp_path, capsys):
    copied(world, tmp_path)
    every_mask(TWO_VALUES)(tmp_path)
    folder = tmp_path / "SegmentationClass"
    code, message = error_of(capsys, words(world, tmp_path / "run", f"data.val_label_dir={folder}"))
    assert code == 2 and f"the masks in {folder} have no pixel of a class" in message
    assert not (tmp_path / "run").exists()


def test_only_rank_0_prints_a_user_error(world, tmp_path):
    copies = copied(world, tmp_path)
    missing("SegmentationClass")(tmp_path)
    for more, code, sentence in (
        (["solver.rate=1"], 2, "rate"),
        (copies, 2, "image_2.png of image image_2 does not exist"),
        (["solver.batch_size=1"], 2, "solver.batch_size 1 is too small for 2 processes"),
    ):
        (first, message), (other, silent) = run(world, tmp_path / "run", *more, count=2)
        assert (first, other, silent) == (code, 1, "")
        assert re.fullmatch(f"error: .*{sentence}.*\n", message)
    mask(np.full((40, 52), 13, np.uint8))(tmp_path)
    (first, message), (other, silent) = run(world, tmp_path / "run", *copies, count=2)
    assert (first, other, silent) == (1, 1, "")
    assert re.fullmatch("error: training stopped: mask .*image_2.png has the value 13.*\n", message)


def test_initial_weights_select_stride_in(world, tmp_path):
    theirs = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1])
    torch.save(theirs.state_dict(), tmp_path / "resnet.pth")
    wide = [f"model.init={tmp_path}/resnet.pth", "model.width=64"]
    config = configs.read(Config, world / "tiny.yaml", [*wide, f"run.output={tmp_path}/run"])
    trainer = loop.prepare(RECIPE, config)
    first = trainer.model.base.layer3.block1
    assert (first.reduce.conv.stride, first.conv3x3.conv.stride) == ((1, 1), (2, 2))
    assert configs.read(Config, tmp_path / "run" / "config.yaml").model.stride_in == "conv3x3"
