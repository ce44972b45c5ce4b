"""classify.py and pseudo_masks.py --labels auto: golden vectors, interruptions and user errors."""

import json
import os
import pickle
from functools import partial

import numpy as np
import pytest
import torch

import clip
from cocostuff.prepare import convert_split
from pipeline import run
from pipeline.label_scores import LabelRule, read_scores, write_labels, write_scores
from segmentation import camfile
from segmentation.labels import read_split
from segmentation.masks import read_mask
from tagclip import classify, model, step
from tests import processes
from tests.tagclip.common import IMAGES, SETS, golden, image, write_model

DATASETS = {"voc": "voc2012", "coco": "coco2017", "stuff": "cocostuff"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The golden images, their model, and the golden labels of the three sets as split files."""
    root = tmp_path_factory.mktemp("tags")
    for name in IMAGES:
        image(name).save(root / f"{name}.png")
    write_model(root / "tiny12.pt")
    expected = golden("end_to_end")
    for name in SETS:
        (root / f"{name}.txt").write_text(str(expected[f"{name}/split"]))
    split, problems = convert_split(read_split(root / "stuff.txt"), root / "stuff.txt")
    assert not problems
    lines = [" ".join([image, *map(str, class_ids)]) for image, class_ids in split.items()]
    (root / "stuff.txt").write_text("\n".join(lines))
    (root / "ids.txt").write_text("\n".join(IMAGES))
    return root


@pytest.fixture(autouse=True)
def _golden_text(monkeypatch):
    """Replace the slow encoding of prompts by golden text features; test_stages tests the encoding."""
    encode = clip.prompts.encode_prompts

    def golden_features(model, names, templates):
        for name, (_, expected, _) in SETS.items():
            if list(names) == expected and len(templates) == 85:
                return torch.from_numpy(golden("text")[f"{name}/features"])
        return encode(model, names, templates)

    monkeypatch.setattr(clip.prompts, "encode_prompts", golden_features)


def flags(world, output, *more, name="voc", split=None) -> list[str]:
    words = ["--benchmark", DATASETS[name], "--image_root", world, "--model", world / "tiny12.pt"]
    words += ["--split_file", split or world / f"{name}.txt", "--output", output, "--device", "cpu", *more]
    return [str(word) for word in words]


@pytest.mark.parametrize("name", SETS)
def test_scores_labels_and_metrics_match_golden(world, tmp_path, capsys, name):
    expected = {k.removeprefix(f"{name}/"): v for k, v in golden("end_to_end").items() if k.startswith(name)}
    saved, report = tmp_path / "deep" / "labels.txt", tmp_path / "scores.json"
    assert classify.main(flags(world, tmp_path / "o", "--save_file", saved, "--json", report, name=name)) == 0
    assert saved.read_text() == (tmp_path / "o" / "labels.txt").read_text() == str(expected["label_file"])
    scores = read_scores(tmp_path / "o", SETS[name][0])
    np.testing.assert_allclose([scores[image] for image in IMAGES], expected["scores"], atol=5e-4)
    metrics = json.loads(report.read_text())
    means = [metrics[key] for key in ("mAP", "F1", "Precision", "Recall")]
    np.testing.assert_allclose(means, expected["metrics"], atol=1e-6)
    each = [value or 0 for value in metrics["AP"].values()]
    np.testing.assert_allclose(each, expected["ap"], atol=1e-6)
    output = capsys.readouterr().out.splitlines()
    mean, f1, precision, recall = expected["metrics"]
    assert output[0] == f"mAP: {mean:.6f}"
    assert output[-1] == f"F1: {f1:.6f}, Precision: {precision:.6f}, Recall: {recall:.6f}"
    assert ("with positives" in output[1]) == (metrics["classes without positives"] > 0)


def test_label_file_is_a_valid_split_file(world, tmp_path):
    """A second run reads the labels of the first as true labels, and scores perfectly."""
    file, report = tmp_path / "labels.txt", tmp_path / "scores.json"
    assert classify.main(flags(world, tmp_path / "o", "--save_file", file, split=world / "ids.txt")) == 0
    assert classify.main(flags(world, tmp_path / "o", "--json", report, split=file)) == 0
    scores = json.loads(report.read_text())
    assert scores["Precision"] == pytest.approx(1) and scores["Recall"] > 0.8  # one image has equal scores


def test_labels_are_written_without_true_labels(world, tmp_path, capsys):
    json_file = tmp_path / "scores.json"
    assert classify.main(flags(world, tmp_path / "o", "--json", json_file, split=world / "ids.txt")) == 0
    printed = capsys.readouterr()
    assert "no image has true labels: no metrics are computed" in printed.err
    assert printed.out == "" and not json_file.exists()
    assert [*read_split(tmp_path / "o" / "labels.txt")] == [*IMAGES]


def test_labels_flag_gives_the_true_labels(world, tmp_path, capsys):
    classify.main(flags(world, tmp_path / "a"))
    expected = capsys.readouterr().out
    classify.main(flags(world, tmp_path / "b", "--labels", world / "voc.txt", split=world / "ids.txt"))
    assert capsys.readouterr().out == expected


def test_save_file_without_name_has_the_reference_name(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = flags(world, "", "--save_file")
    position = arguments.index("--output")
    del arguments[position : position + 2]
    assert classify.main(arguments) == 0
    assert (tmp_path / "output/voc2012_val_tagclip.txt").is_file()
    assert (tmp_path / "output/voc2012_tags/labels.txt").is_file()


def test_stopped_run_resumes(world, tmp_path, monkeypatch):
    """Scores before the stop are kept, no image is scored twice, and labels are in the order of the split."""
    monkeypatch.setattr(step, "PERIOD", 0)
    scored_shapes = []
    tag_images = model.tag_images

    def stopped(model, images, *more):
        if len(scored_shapes) == 4:
            raise KeyboardInterrupt
        scored_shapes.extend(image.shape for image in images)
        return tag_images(model, images, *more)

    monkeypatch.setattr(model, "tag_images", stopped)
    out = tmp_path / "o"
    with pytest.raises(KeyboardInterrupt):
        classify.main(flags(world, out, "--threads", 1))
    before = read_scores(out, 20)
    assert 0 < len(before) <= 4 and not (out / "labels.txt").exists()
    left = []
    monkeypatch.setattr(model, "tag_images", lambda m, i, *more: left.extend(i) or tag_images(m, i, *more))
    assert classify.main(flags(world, out, "--threads", 1)) == 0
    assert len(left) == len(IMAGES) - len(before)
    assert (out / "labels.txt").read_text() == str(golden("end_to_end")["voc/label_file"])
    left.clear()
    monkeypatch.setattr(clip, "load", None)  # a finished run loads no model
    assert classify.main(flags(world, out)) == 0 and not left


@pytest.mark.parametrize("damage", ["cut", "not finite"])
def test_images_of_a_damaged_file_of_scores_are_scored_again(world, tmp_path, caplog, damage):
    assert classify.main(flags(world, tmp_path / "o")) == 0
    labels = (tmp_path / "o" / "labels.txt").read_text()
    (file,) = (tmp_path / "o").glob("scores-*.npz")
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:300])
    else:
        with np.load(file) as content:
            names, values = content["names"], content["scores"]
        np.savez(file, names=names, scores=values * np.float32(np.nan))
    assert classify.main(flags(world, tmp_path / "o")) == 0
    assert (tmp_path / "o" / "labels.txt").read_text() == labels
    assert f"{file.name} is damaged" in caplog.text
    caplog.clear()
    assert classify.main(flags(world, tmp_path / "o")) == 0 and "is damaged" not in caplog.text


def test_images_without_finite_scores_fail(world, tmp_path):
    """These positions are finite in the file, but not after their rounding to float16."""
    state = torch.load(world / "tiny12.pt")
    state["visual.positional_embedding"][:] = 7e4
    torch.save(state, tmp_path / "large.pt")
    more = ["--model", tmp_path / "large.pt", "--position_rounding", "always"]
    assert classify.main(flags(world, tmp_path / "o", *more)) == 1
    failed = (tmp_path / "o" / "failed.txt").read_text().splitlines()
    assert len(failed) == len(IMAGES) and all("features are not finite" in line for line in failed)
    assert not (tmp_path / "o" / "labels.txt").read_text() and not [*(tmp_path / "o").glob("scores-*")]


def test_two_ranks_give_the_same_labels(world, tmp_path):
    """Each rank writes its own file of scores; only rank 0 prints."""
    expected = str(golden("end_to_end")["voc/label_file"])
    started = processes.ranks(partial(classify.main, flags(world, tmp_path / "ranks")))
    (code, printed, _), (other, silent, _) = (process.end() for process in started)
    assert (code, other, silent) == (0, 0, "") and printed.count("mAP: ") == 1
    assert (tmp_path / "ranks" / "labels.txt").read_text() == expected
    assert len(list((tmp_path / "ranks").glob("scores-*.npz"))) == 2


def test_batches_give_the_labels_of_single_images(world, tmp_path):
    assert classify.main(flags(world, tmp_path / "o", "--batch_size", 4, "--threads", 1)) == 0
    assert (tmp_path / "o" / "labels.txt").read_text() == str(golden("end_to_end")["voc/label_file"])
    expected, scores = golden("end_to_end")["voc/scores"], read_scores(tmp_path / "o", 20)
    np.testing.assert_allclose([scores[image] for image in IMAGES], expected, atol=5e-4)


def test_image_too_large_for_memory_fails_alone(world, tmp_path, monkeypatch, capsys):
    """Batches of its size are halved from then on; batches of other sizes are not."""
    batches = []
    tag_images = model.tag_images

    def limited(clip_model, images, *more):
        batches.append(len(images))
        if any(image.shape[0] * image.shape[1] > 200 * 16**2 for image in images):
            raise MemoryError
        return tag_images(clip_model, images, *more)

    (tmp_path / "images").mkdir()
    names = ["large", *(f"small_{number}" for number in range(8))]
    for name in names:
        image(name, (240, 320) if name == "large" else (32, 48)).save(tmp_path / "images" / f"{name}.png")
    (tmp_path / "ids.txt").write_text("\n".join(names))
    monkeypatch.setattr(model, "tag_images", limited)
    more = ["--image_root", tmp_path / "images", "--batch_size", 4, "--prefetch", 9, "--threads", 1]
    assert classify.main(flags(world, tmp_path / "o", *more, split=tmp_path / "ids.txt")) == 1
    assert "too little memory for an image of shape up to 512 patches" in capsys.readouterr().err
    assert batches == [1, 4, 4] and len(read_split(tmp_path / "o" / "labels.txt")) == 8


def test_step_can_be_pickled(world, tmp_path, monkeypatch):
    """Worker processes receive a pickled step."""
    run_step = run.run_step
    monkeypatch.setattr(run, "run_step", lambda *args: run_step(*pickle.loads(pickle.dumps(args))))
    assert classify.main(flags(world, tmp_path / "o")) == 0
    assert (tmp_path / "o" / "labels.txt").read_text() == str(golden("end_to_end")["voc/label_file"])


def test_bad_images_are_skipped_and_listed(world, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for name in ("tagclip-0", "tagclip-4"):
        image(name).save(tmp_path / "images" / f"{name}.png")
    (tmp_path / "images" / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "ids.txt").write_text("tagclip-0 8\nbroken 1\nmissing 2\ntagclip-4 3\n")
    arguments = flags(world, tmp_path / "o", "--image_root", tmp_path / "images", split=tmp_path / "ids.txt")
    assert classify.main(arguments) == 1
    printed = capsys.readouterr()
    assert "4 images, 2 failed" in printed.err and "mAP: " in printed.out
    assert [*read_split(tmp_path / "o" / "labels.txt")] == ["tagclip-0", "tagclip-4"]
    failed = (tmp_path / "o" / "failed.txt").read_text()
    assert "broken.jpg cannot be read" in failed and "no image missing" in failed


def test_other_settings_require_overwrite(world, tmp_path):
    assert classify.main(flags(world, tmp_path / "o")) == 0
    with pytest.raises(ValueError, match=r"other settings: votes \(was None, now 3\)"):
        classify.main(flags(world, tmp_path / "o", "--votes", 3))
    assert classify.main(flags(world, tmp_path / "o", "--votes", 3, "--overwrite")) == 0


def test_every_setting_has_a_flag_and_is_recorded(world, tmp_path):
    values = {
        "affinity_layers": 2, "voting_layers": 5, "votes": 3, "vote_threshold": 0.9, "box_threshold": 1.1,
        "ratio": 0.4, "cell_threshold": 0.6, "crop_size": 64, "local_weight": 0.25, "diagonal_bias": -50.0,
        "crop_bias": -70.0, "include_edge": True, "skip_empty_crops": True, "position_rounding": "never",
        "max_patches": 20,
    }  # fmt: skip
    words = [f"--{name}" if value is True else f"--{name}={value}" for name, value in values.items()]
    assert classify.main(flags(world, tmp_path / "o", *words)) == 0
    recorded = json.loads((tmp_path / "o" / "settings.json").read_text())["settings"]
    assert {key: recorded[key] for key in values} == values
    assert recorded["weights_rounded"] is False
    assert classify.main(flags(world, tmp_path / "all", "--affinity_layers", "all", "--round_weights")) == 0
    recorded = json.loads((tmp_path / "all" / "settings.json").read_text())["settings"]
    assert recorded["affinity_layers"] is None and recorded["ratio"] == 0.5
    assert recorded["weights_rounded"] is True


def test_reference_spellings_of_flags_are_aliases(world, tmp_path):
    present = ["--benchmark", "voc2012", "--image_root", "images", "--model", "ViT-B/16"]
    present += ["--affinity_layers", "2", "--voting_layers", "5", "--include_edge", "--prefetch", "3"]
    aliases = {
        "--benchmark": "--dataset", "--image_root": "--img_root", "--model": "--model_path",
        "--affinity_layers": "--averaged_blocks", "--voting_layers": "--voting_blocks",
        "--include_edge": "--cover_edge", "--prefetch": "--look_ahead",
    }  # fmt: skip
    parse = classify.make_parser().parse_args
    assert parse([aliases.get(word, word) for word in present]) == parse(present)


def test_folders_of_earlier_versions_continue(world, tmp_path):
    """Earlier versions recorded some settings under other names."""
    assert classify.main(flags(world, tmp_path / "o")) == 0
    file = tmp_path / "o" / "settings.json"
    record = json.loads(file.read_text())
    for name, earlier in (
        ("affinity_layers", "averaged"), ("voting_layers", "voting"), ("include_edge", "cover_edge")
    ):  # fmt: skip
        record["settings"][earlier] = record["settings"].pop(name)
    file.write_text(json.dumps(record))
    assert classify.main(flags(world, tmp_path / "o")) == 0


def test_label_rules_select_labels(world, tmp_path):
    def labels(*more) -> list[list[int]]:
        assert classify.main(flags(world, tmp_path / "o", *more)) == 0
        return [*read_split(tmp_path / "o" / "labels.txt").values()]

    assert all(len(line) == 2 for line in labels("--label_rule", "top", "--label_threshold", 2))
    assert all(len(line) == 1 for line in labels("--label_rule", "absolute", "--label_threshold", 9))
    more = sum(map(len, labels("--label_threshold", 0.1)))
    assert more > sum(map(len, labels()))


def test_image_folder_requires_no_split_file(world, tmp_path):
    (tmp_path / "own.yaml").write_text("{name: own, classes: [dog, cat], backgrounds: [grass], model: none}")
    arguments = ["--benchmark", tmp_path / "own.yaml", "--image_root", world, "--output", tmp_path / "o"]
    arguments += ["--model", world / "tiny12.pt", "--device", "cpu"]
    assert classify.main([*map(str, arguments)]) == 0
    assert [*read_split(tmp_path / "o" / "labels.txt")] == sorted(IMAGES)


def test_hidden_files_are_ignored_and_blanks_are_errors(world, tmp_path):
    image("tagclip-4").save(tmp_path / "a.png")
    (tmp_path / "._a.jpg").write_bytes(b"hidden file of a file manager")
    (tmp_path / "own.yaml").write_text("{name: own, classes: [dog, cat], backgrounds: [grass]}")
    arguments = ["--benchmark", tmp_path / "own.yaml", "--image_root", tmp_path, "--output", tmp_path / "o"]
    arguments = [*map(str, [*arguments, "--model", world / "tiny12.pt", "--device", "cpu"])]
    assert classify.main(arguments) == 0
    assert [*read_split(tmp_path / "o" / "labels.txt")] == ["a"]
    image("tagclip-4").save(tmp_path / "IMG 7.png")
    with pytest.raises(ValueError, match=r"image folder .*: image name .IMG 7. contains a blank: rename"):
        classify.main(arguments)


def test_name_that_is_not_utf8_is_refused_before_images_are_scored(world, tmp_path):
    (tmp_path / "images").mkdir()
    image("tagclip-4").save(tmp_path / "images" / os.fsdecode(b"caf\xe9.png"))
    arguments = flags(world, tmp_path / "o")
    arguments[arguments.index("--image_root") + 1] = str(tmp_path / "images")
    position = arguments.index("--split_file")
    del arguments[position : position + 2]
    arguments[arguments.index("--benchmark") + 1] = str(tmp_path / "own.yaml")
    (tmp_path / "own.yaml").write_text("{name: own, classes: [dog, cat], backgrounds: [grass]}")
    with pytest.raises(ValueError, match=r"image name 'caf\\udce9' contains .* bytes that are not UTF-8"):
        classify.main(arguments)
    assert not (tmp_path / "o").exists()


def test_scores_whose_names_cannot_be_encoded_are_kept(tmp_path):
    scores = {"caf\udce9": np.float32([1, 2]), "x": np.float32([3, 4])}
    write_scores(tmp_path, scores)
    kept = read_scores(tmp_path, 2)
    assert kept.keys() == scores.keys() and all((kept[name] == scores[name]).all() for name in scores)
    write_labels(tmp_path / "labels.txt", kept, LabelRule(0.5))
    assert (tmp_path / "labels.txt").read_text() == "caf\\udce9 1\nx 1\n"


def test_scores_that_cannot_be_written_at_once_are_written_later(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(step, "PERIOD", 0)
    write, failures = step.write_scores, []

    def fail_twice(folder, scores):
        if len(failures) < 2:
            failures.append(len(scores))
            raise PermissionError(f"{folder}/scores.npz cannot be written (Permission denied)")
        return write(folder, scores)

    monkeypatch.setattr(step, "write_scores", fail_twice)
    assert classify.main(flags(world, tmp_path / "o", "--threads", 1)) == 0
    assert failures[0] < failures[1] or failures == [1, 1]
    assert (tmp_path / "o" / "labels.txt").read_text() == str(golden("end_to_end")["voc/label_file"])
    assert capsys.readouterr().err.count("the scores are kept in memory and written later") == 2


def test_images_without_true_labels_are_not_scored(world, tmp_path, capsys):
    (tmp_path / "some.txt").write_text("tagclip-0 8\ntagclip-2 10\n")
    files = ["--labels", tmp_path / "some.txt", "--json", tmp_path / "scores.json"]
    assert classify.main(flags(world, tmp_path / "o", *files, split=world / "ids.txt")) == 0
    assert f"{len(IMAGES) - 2} images without true labels are not scored" in capsys.readouterr().err
    assert json.loads((tmp_path / "scores.json").read_text())["images"] == 2


def test_user_errors_are_reported(world, tmp_path):
    with pytest.raises(FileNotFoundError, match="image folder nowhere does not exist: give --image_root"):
        classify.main(flags(world, tmp_path / "o", "--image_root", "nowhere"))
    with pytest.raises(ValueError, match="voting_layers is 30, but 12 blocks can vote: give at most 12"):
        classify.main(flags(world, tmp_path / "o", "--voting_layers", 30))
    for rule, threshold, sentence in (
        ("absolute", None, "requires --label_threshold X"),
        ("absolute", "inf", "must be a finite number, got inf"),
        ("relative", "5", "must be a number from 0 to 1, got 5"),
        ("relative", "nan", "must be a number from 0 to 1, got nan"),
        ("top", "0.5", "must be a whole number, 1 or more, got 0.5"),
        ("top", "inf", "must be a whole number, 1 or more, got inf"),
    ):
        more = [] if threshold is None else ["--label_threshold", threshold]
        with pytest.raises(ValueError, match=f"--label_rule {rule} {sentence}"):
            classify.main(flags(world, tmp_path / "o", "--label_rule", rule, *more))
    with pytest.raises(FileNotFoundError, match=r"nosuch\.txt does not exist"):
        classify.main(flags(world, tmp_path / "o", "--labels", "nosuch.txt"))
    (tmp_path / "far.txt").write_text("tagclip-0 99\n")
    with pytest.raises(ValueError, match="class index 99 is out of range"):
        classify.main(flags(world, tmp_path / "o", split=tmp_path / "far.txt"))
    for flag in ("--json", "--save_file"):
        with pytest.raises(ValueError, match="is a folder: give a file"):
            classify.main(flags(world, tmp_path / "o", flag, tmp_path))
    with pytest.raises(ValueError, match=r"voc\.txt is an input and would be overwritten"):
        classify.main(flags(world, tmp_path / "o", "--save_file", world / "voc.txt"))
    with pytest.raises(ValueError, match=r"both\.txt is given for two outputs"):
        both = tmp_path / "both.txt"
        classify.main(flags(world, tmp_path / "o", "--save_file", both, "--json", both))
    (tmp_path / "own.yaml").write_text(f"{{name: own, classes: [dog, cat], split_file: {world / 'voc.txt'}}}")
    with pytest.raises(ValueError, match=r"voc\.txt is an input and would be overwritten"):
        own = ["--benchmark", tmp_path / "own.yaml", "--image_root", world, "--save_file", world / "voc.txt"]
        classify.main([*map(str, own)])
    assert not list((tmp_path / "o").glob("scores-*"))  # all errors come before any computation
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "labels.txt").write_text("tagclip-0 8\n")
    with pytest.raises(ValueError, match=r"own contains labels.txt but no settings.json"):
        classify.main(flags(world, tmp_path / "own"))
    with pytest.raises(FileNotFoundError, match=r"split file of benchmark voc12, does not exist: prepare"):
        classify.main(["--benchmark", "voc2012", "--image_root", str(world)])
    with pytest.raises(ValueError, match="no benchmark 'nosuch': give voc12"):
        classify.main(["--benchmark", "nosuch"])


# pseudo_masks.py --labels auto


def words(world, output, *more) -> list:
    images = ["--image_root", world, "--split_file", world / "ids.txt"]
    command = ["pseudo_masks.py", "--benchmark", "voc12", *images, "--model", world / "tiny12.pt"]
    return [*command, "--device", "cpu", "--output", output, *more]


def pseudo_masks(world, output, *more) -> int:
    code, _, errors = processes.here(*words(world, output, *more))
    assert "Traceback" not in errors
    return code


def test_auto_labels_equal_two_commands(world, tmp_path):
    """Each step has its own rounding, and records it."""
    assert pseudo_masks(world, tmp_path / "auto", "--labels", "auto") == 0
    assert classify.main(flags(world, tmp_path / "tags", split=world / "ids.txt")) == 0
    assert pseudo_masks(world, tmp_path / "two", "--labels", tmp_path / "tags" / "labels.txt") == 0
    for name in IMAGES:
        mask = read_mask(tmp_path / "auto" / f"{name}.png")
        assert np.array_equal(mask, read_mask(tmp_path / "two" / f"{name}.png"))
    tags = json.loads((tmp_path / "auto" / "tags" / "settings.json").read_text())["settings"]
    assert tags["weights_rounded"] is False and tags["position_rounding"] == "resampled"
    labels = (tmp_path / "auto" / "tags" / "labels.txt").read_text()
    assert labels == str(golden("end_to_end")["voc/label_file"])
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "auto").glob("*.png")}
    (tmp_path / "auto").rename(tmp_path / "moved")
    assert pseudo_masks(world, tmp_path / "moved", "--labels", "auto") == 0  # resumes
    assert all((tmp_path / "moved" / f.name).stat().st_mtime_ns == time for f, time in kept.items())


def test_two_ranks_with_auto_labels_give_the_same_masks(world, tmp_path):
    assert pseudo_masks(world, tmp_path / "one", "--labels", "auto") == 0
    started = processes.ranks(processes.script, *words(world, tmp_path / "two", "--labels", "auto"))
    assert [process.end()[0] for process in started] == [0, 0]
    for name in IMAGES:
        mask = (tmp_path / "two" / f"{name}.png").read_bytes()
        assert mask == (tmp_path / "one" / f"{name}.png").read_bytes()
    assert len(list((tmp_path / "two" / "tags").glob("scores-*"))) == 2


def test_mask_folders_are_checked_before_tagging(world, tmp_path):
    assert pseudo_masks(world, tmp_path / "masks", "--labels", "auto") == 0
    scores = {file: file.stat().st_mtime_ns for file in (tmp_path / "masks/tags").glob("scores-*")}
    (tmp_path / "foreign").mkdir()
    image("tagclip-0").save(tmp_path / "foreign" / "mine.png")
    for output, *more in (
        ("masks", "--confidence", 0.5),
        ("foreign",),
        ("new", "--keep_cams", "compact", "--cam_dir", tmp_path / "new" / "tags"),
        ("outer/masks", "--keep_cams", "compact", "--cam_dir", tmp_path / "outer"),
    ):
        assert pseudo_masks(world, tmp_path / output, "--labels", "auto", *more) == 2
    code = pseudo_masks(world, tmp_path / "masks", "--labels", "auto", "--max_patches", 9)
    assert code == 2  # another setting of tagging
    some = ["--split_file", tmp_path / "masks" / "tags" / "labels.txt"]
    assert pseudo_masks(world, tmp_path / "masks", "--labels", "auto", *some) == 2
    (tmp_path / "masks" / "sub").mkdir()
    image("tagclip-0").save(tmp_path / "masks" / "sub" / "mine.png")
    assert pseudo_masks(world, tmp_path / "masks", "--labels", "auto", "--overwrite") == 2
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "masks/tags").glob("scores-*")} == scores
    assert not (tmp_path / "foreign" / "tags").exists() and not (tmp_path / "new").exists()


def test_kept_cams_have_the_predicted_labels(world, tmp_path):
    assert pseudo_masks(world, tmp_path / "m", "--labels", "auto", "--keep_cams", "compact") == 0
    split = read_split(tmp_path / "m" / "tags" / "labels.txt")
    assert {name: camfile.class_ids_of(tmp_path / "m" / "cams", name) for name in split} == split


def test_auto_labels_skip_bad_images(world, tmp_path):
    (tmp_path / "images").mkdir()
    image("tagclip-4").save(tmp_path / "images" / "tagclip-4.png")
    (tmp_path / "ids.txt").write_text("tagclip-4\nmissing\n")
    some = ["--image_root", tmp_path / "images", "--split_file", tmp_path / "ids.txt", "--labels", "auto"]
    assert pseudo_masks(world, tmp_path / "masks", *some) == 1
    assert [file.name for file in (tmp_path / "masks").glob("*.png")] == ["tagclip-4.png"]
    (tmp_path / "ids.txt").write_text("missing\n")
    assert pseudo_masks(world, tmp_path / "none", *some) == 1
    assert pseudo_masks(world, tmp_path / "masks", "--labels", "auto", "--shards", "x.tar") == 2
