"""The report page: the outputs of all steps on a data set, as figures and scores.

`python -m pipeline.report --help`. The page is one HTML file that contains its figures and loads nothing.
"""
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from foundation.cli import Parser
from foundation.files import write_file
from pipeline import figures, records
from pipeline.evaluate import benchmark_scores, scored_names
from pipeline.masks import MaskSettings, crf_labels, mask_values
from pipeline.run import SETTINGS, command, read_settings
from segmentation import benchmark as benchmarks
from segmentation import camfile
from segmentation.benchmark import IGNORE, Benchmark
from segmentation.images import find_image, read_rgb
from segmentation.labels import Split, read_split
from segmentation.masks import mask_class_ids, read_mask
from segmentation.metrics import confusion

STAGES = ("Initial CAM", "Refined CAM", "Dense CRF")  # in the order of --scores
MASKS = ("Pseudo mask", "Mask from tags")  # in the order of --auto_scores
NEEDS_LABELS, NEEDS_IMAGE = "with true labels", "without labels"


@dataclass(frozen=True)
class Network:
    """Predictions of a trained network on the validation images."""

    title: str  # title of its column
    mask_dir: str  # predicted masks
    score_file: str  # JSON of their scores, as written by `python -m deeplab.test`
    crf_file: str | None = None  # JSON of the scores after a dense CRF


@dataclass(frozen=True)
class Results:
    """The outputs of the steps. Score files are JSON. The page leaves out empty fields."""

    benchmark: Benchmark
    names: Sequence[str]  # ids of the training images
    image_root: str
    cam_dir: str  # CAM files with the types `highres` and `attn_highres` (step 1 with --keep_initial)
    mask_dir: str  # pseudo masks
    gt_root: str | None = None  # ground-truth masks
    scores: Sequence[str] = ()  # score files of the initial CAM, the refined CAM and the dense CRF

    auto_masks: tuple[str, str] | None = None  # masks from tags, and file of step 0's labels
    auto_tags: str | None = None  # score file of these labels
    auto_scores: Sequence[str] = ()  # score files of the pseudo masks and of the masks from tags

    networks: Sequence[Network] = ()
    val_names: Sequence[str] = ()  # ids of the validation images, which no network was trained on
    val_image_root: str = ""
    val_gt_root: str = ""
    val_scores: Sequence[str] = ()  # score files of the refined CAM and the dense CRF on them
    note: str = ""  # text below the introduction

    def __post_init__(self):
        if len({network.title for network in self.networks}) < len(self.networks):
            titles = ", ".join(network.title for network in self.networks)
            raise ValueError(f"--network: two networks have the same title ({titles}): rename one")


def mask_score(mask_dir: str, gt_root: str, name: str, benchmark: Benchmark) -> float:
    """Return the mIoU of one mask over the classes (or groups) of its image, without ignored pixels; NaN if
    all pixels are ignored."""
    file = Path(mask_dir) / f"{name}.png"
    truth, mask = read_mask(Path(gt_root) / f"{name}.png"), read_mask(file)
    try:
        return benchmark_scores(confusion(truth, mask, benchmark.channels), benchmark)["Mean IoU"]
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def evenly_spaced(names: Sequence[str], count: int) -> list[str]:
    """Return `count` of `names` at even steps, including the first and the last name."""
    steps = np.linspace(0, len(names) - 1, min(count, len(names)))
    return [names[round(step)] for step in steps]


def best_to_worst(
    names: Sequence[str], mask_dir: str, gt_root: str, benchmark: Benchmark, count: int
) -> list[str]:
    """Return `count` names at even steps from the mask of highest mIoU to the lowest; NaN counts as 0."""
    ious = {name: np.nan_to_num(mask_score(mask_dir, gt_root, name, benchmark)) for name in names}
    return evenly_spaced(sorted(ious, key=lambda name: -ious[name]), count)


def mask_entry(mask_dir: str, gt_root: str | None, name: str, benchmark: Benchmark) -> dict[str, Any]:
    """Return the figure of a mask, its proportion of ignored pixels and its mIoU (None without `gt_root`)."""
    mask = read_mask(Path(mask_dir) / f"{name}.png")
    return {
        "figure": figures.mask_figure(mask, figures.page_palette(benchmark)),
        "ignored": float((mask == IGNORE).mean()),
        "iou": mask_score(mask_dir, gt_root, name, benchmark) if gt_root is not None else None,
    }


def recorded_masks(results: Results) -> tuple[str, MaskSettings]:
    """Return the CAM type and settings that the mask folder records; missing ones have their defaults."""
    recorded = read_settings(results.mask_dir).get("settings", {})
    names = {"image_mode": "crf_image", "unary_type": "crf_unary"}
    cam_type, crf = recorded.get("cam_type", "attn_highres"), recorded.get("crf", {})
    if not isinstance(cam_type, str) or not isinstance(crf, dict):
        raise ValueError(
            f"{results.mask_dir}: the settings cam_type and crf in {SETTINGS} are damaged: restore the file"
        )
    changes = {names[key]: value for key, value in crf.items() if key in names}
    if "confidence" in recorded:
        changes["confidence"] = recorded["confidence"]
    return cam_type, MaskSettings(crf_backend="numba", **changes)


def compare_tags(
    tags: Sequence[int], labels: Sequence[int], classes: Sequence[str]
) -> list[tuple[str, str]]:
    """Return (class name, verdict) of each label and each wrong tag. The verdict is "" if the label is among
    the tags, "missed" if it is not, "wrong" for tags that are no label."""
    compared = [(index, "" if index in tags else "missed") for index in labels]
    compared += [(index, "wrong") for index in tags if index not in labels]
    return [(classes[index], verdict) for index, verdict in compared]


def sample(
    results: Results, name: str, cam_type: str, settings: MaskSettings, tags: Split | None = None
) -> dict[str, Any]:
    """Return the contents of the page for one training image; figures are data URLs.

    Args:
        cam_type, settings: how its pseudo mask was made, see `recorded_masks`.
        tags: the labels of step 0; required if `results.auto_masks` is given.
    """
    benchmark, gt_root = results.benchmark, results.gt_root
    image = read_rgb(find_image(results.image_root, name))
    try:
        class_ids, initial = camfile.read(results.cam_dir, name, "highres")
    except ValueError as error:
        raise ValueError(f"{error}; the page needs initial CAMs: run step 1 with --keep_initial") from None
    _, refined = camfile.read(results.cam_dir, name, "attn_highres")
    _, cams = camfile.read(results.cam_dir, name, cam_type)
    values = mask_values(class_ids, benchmark, cam_type)
    labels = crf_labels(image, cams, values, replace(settings, confidence=0))
    entry = {
        "name": name,
        "image": figures.image_figure(image),
        "cams": [
            {
                "name": benchmark.classes[index],
                "initial": figures.image_figure(figures.cam_overlay(image, before)),
                "refined": figures.image_figure(figures.cam_overlay(image, after)),
            }
            for index, before, after in zip(class_ids, initial, refined, strict=True)
        ],
        "crf": figures.mask_figure(labels, figures.page_palette(benchmark)),
        "mask": mask_entry(results.mask_dir, gt_root, name, benchmark),
        "auto_mask": None,
        "truth": gt_root and mask_entry(gt_root, None, name, benchmark)["figure"],
    }
    if results.auto_masks:
        mask_dir, label_file = results.auto_masks
        if name not in tags:
            raise ValueError(f"{label_file} has no line for image {name}: give the labels of step 0")
        if mask_class_ids(Path(mask_dir) / f"{name}.png") not in (None, tags[name]):
            raise ValueError(
                f"the mask of {name} in {mask_dir} was made from other labels than those in {label_file}: "
                "make the masks again, or give the labels that they were made from"
            )
        entry["auto_mask"] = mask_entry(mask_dir, gt_root, name, benchmark)
        entry["auto_mask"]["tags"] = compare_tags(tags[name], class_ids, benchmark.classes)
    return entry


def predictions(results: Results, count: int) -> list[dict[str, Any]]:
    """Return the contents of the page for `count` validation images, from the best to the worst mask of the
    first network."""
    benchmark, gt_root, first = results.benchmark, results.val_gt_root, results.networks[0]
    return [
        {
            "name": name,
            "image": figures.image_figure(read_rgb(find_image(results.val_image_root, name))),
            "masks": [
                {"title": network.title, **mask_entry(network.mask_dir, gt_root, name, benchmark)}
                for network in results.networks
            ],
            "truth": mask_entry(gt_root, None, name, benchmark)["figure"],
        }
        for name in best_to_worst(results.val_names, first.mask_dir, gt_root, benchmark, count)
    ]


def render(results: Results, images: int = 8) -> str:
    """Return the page as HTML.

    Args:
        images: number of images to show per split. They are selected at even steps: with ground truth, from
            the best to the worst mask; without ground truth, through the split.

    Raises:
        FileNotFoundError, ValueError: a file is missing or cannot be read.
    """
    benchmark, names, tags = results.benchmark, results.names, None
    cam_type, settings = recorded_masks(results)
    title, mask_dir = MASKS[0], results.mask_dir
    if results.auto_masks:
        title, (mask_dir, label_file) = MASKS[1], results.auto_masks
        tags = read_split(label_file, len(benchmark.classes))
    order, selected = "through the split", evenly_spaced(names, images)
    if results.gt_root is not None:
        order = f"from the best {title.lower()} to the worst"
        selected = best_to_worst(names, mask_dir, results.gt_root, benchmark, images)
    classes = ["background"] * benchmark.has_background + list(benchmark.classes)
    loader, undefined = jinja2.FileSystemLoader(Path(__file__).parent), jinja2.StrictUndefined
    environment = jinja2.Environment(
        loader=loader, undefined=undefined, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html.j2").render(
        benchmark=benchmark,
        results=results,
        tag_scores=records.read_tag_scores(results.auto_tags) if results.auto_tags else None,
        scored=_scored(results),
        score_rows=scored_names(benchmark),
        selection=f"{len(selected)} of {len(names)} images, at even steps {order}.",
        legend=dict(zip(classes, figures.page_palette(benchmark), strict=False)),
        cam_colors=figures.cam_overlay(np.full((1, 9, 3), 160, np.uint8), np.linspace(0, 1, 9)[None])[0],
        confidence=f"{settings.confidence:g}",
        samples=[sample(results, name, cam_type, settings, tags) for name in selected],
        predictions=predictions(results, images) if results.networks else [],
        records=recorded(results),
    )


def _scored(results: Results) -> list[dict[str, Any]]:
    """Return the splits that have scores, each with its stages. `needs` says whether a stage needs labels."""

    def stages(titles: Sequence[str], files: Sequence[str], needs: str) -> list[dict[str, Any]]:
        classes = scored_names(results.benchmark)
        pairs = zip(titles, files, strict=True) if files else ()
        return [records.read_stage(title, file, classes) | {"needs": needs} for title, file in pairs]

    # Without masks from tags, all stages of the training images need labels, so the page omits the note.
    train = stages(STAGES, results.scores, NEEDS_LABELS if results.auto_masks else "")
    train += stages(MASKS, results.auto_scores, NEEDS_LABELS)
    if results.auto_scores:
        train[-1]["needs"] = NEEDS_IMAGE
    val = stages(STAGES[1:], results.val_scores, NEEDS_LABELS)
    for network in results.networks:
        val += stages([network.title], [network.score_file], NEEDS_IMAGE)
        if network.crf_file:
            crf = stages([network.title], [network.crf_file], NEEDS_IMAGE)[0]
            mean = "–" if crf["mean"] is None else f"{100 * crf['mean']:.1f}"
            val[-1]["note"] = f"{mean} % after a dense CRF"
    splits = [(results.names, "training", train), (results.val_names, "validation", val)]
    return [{"title": f"{len(names)} {split} images", "stages": shown} for names, split, shown in splits
            if shown]  # fmt: skip


def recorded(results: Results) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return (title, rows) of the settings of each step and of the versions of packages. Settings that are
    equal for all masks, or for all networks, are in a separate table."""
    tags, masks = {}, {"Step 2b, pseudo masks": [results.mask_dir]}
    if results.auto_masks:
        mask_dir, label_file = results.auto_masks
        tags["Step 0, tags"] = [Path(label_file).parent]
        masks["Step 2b, masks from tags"] = [mask_dir]
    trained = {}
    for network in results.networks:
        checkpoint = records.read_checkpoint(network.score_file)
        training = [Path(checkpoint).parent] if checkpoint else []
        trained[f"Step 3, {network.title}"] = [*training, network.mask_dir]
    groups = {
        "Step 0": tags,
        "Step 1": {"Step 1, CAMs": [results.cam_dir]},
        "Step 2b, all masks": masks,
        "Step 3, all networks": trained,
    }
    tables, versions = {}, {}
    for common, steps in groups.items():
        settings = {title: [read_settings(folder) for folder in folders] for title, folders in steps.items()}
        tables |= records.tables(settings, common)
        for record in chain(*settings.values()):
            versions |= record.get("versions", {})
    return [(title, list(rows.items())) for title, rows in (tables | {"Versions": versions}).items() if rows]


def main() -> None:
    parser = Parser(description="Write a report page, one HTML file of figures and scores.")
    flag = parser.add_argument
    flag("--benchmark", "--dataset", required=True, metavar="NAME|FILE.yaml",
         help="data set: voc12, coco14, cocostuff, shapes or a YAML file")  # fmt: skip
    flag("--image_root", "--img_root", required=True, help="image folder")
    flag("--split_file", required=True, help="image ids, one per line")
    flag("--cam_dir", "--cam_out_dir", required=True, help="CAM folder of step 1 with --keep_initial")
    flag("--pseudo_mask_dir", dest="mask_dir", required=True, help="folder of the pseudo masks of step 2b")
    flag("--gt_root", help="folder of the ground-truth masks")
    flag("--scores", nargs=3, default=(), metavar=("INITIAL.json", "REFINED.json", "CRF.json"),
         help="scores of initial CAMs, refined CAMs and dense CRF, written with --json")  # fmt: skip
    flag("--output", "--out", default="output/report.html", help="HTML file to write")
    flag("--note", default="", help="text below the introduction of the page")
    flag("--images", type=int, default=8, help="number of images to show per split")
    flag = parser.add_argument_group("masks of the same images, made without annotation").add_argument
    flag("--auto_masks", nargs=2, metavar=("MASK_DIR", "LABELS.txt"), help="folder of the masks, and file "
         "of step 0's labels; pseudo_masks.py --labels auto writes MASK_DIR/tags/labels.txt")  # fmt: skip
    flag("--auto_tags", metavar="TAGS.json", help="scores of these labels, written by classify.py --json")
    flag("--auto_scores", nargs=2, default=(), metavar=("MASKS.json", "AUTO_MASKS.json"),
         help="scores of --pseudo_mask_dir and --auto_masks, written by eval_cam.py --cam_type png "
         "--json")  # fmt: skip
    flag = parser.add_argument_group("trained networks (step 3) on validation images").add_argument
    flag("--network", nargs=3, action="append", default=[], metavar=("TITLE", "MASK_DIR", "SCORES.json"),
         help="title of a network, and masks and scores of its test; may be repeated")  # fmt: skip
    flag("--network_crf", nargs="+", metavar="SCORES.json",
         help="scores of each --network after a dense CRF, in the same order")  # fmt: skip
    flag("--val_split_file", help="ids of the validation images, one per line")
    flag("--val_img_root", dest="val_image_root", help="validation images (default: --image_root)")
    flag("--val_gt_root", help="ground-truth masks of the validation images (default: --gt_root)")
    flag("--val_scores", nargs=2, default=(), metavar=("REFINED.json", "CRF.json"),
         help="scores of the refined CAMs and the dense CRF on the validation images; both require the "
         "labels of the images")  # fmt: skip
    args = parser.parse_args()
    crf_files = args.network_crf or [None] * len(args.network)
    if args.network and not (args.val_split_file and (args.val_gt_root or args.gt_root)):
        parser.error("--network: requires --val_split_file, and --val_gt_root or --gt_root")
    if args.network and len(crf_files) != len(args.network):
        count, expected = len(crf_files), len(args.network)
        parser.error(f"--network_crf: got {count} files for {expected} networks: give one file for each")
    val_files = (args.val_split_file, args.val_image_root, args.val_gt_root, args.val_scores)
    if (args.network_crf or any(val_files)) and not args.network:
        parser.error("--network_crf and the --val_ flags: require --network")
    if (args.auto_tags or args.auto_scores) and not args.auto_masks:
        parser.error("--auto_tags and --auto_scores: require --auto_masks")
    args.benchmark, args.names = benchmarks.load(args.benchmark), list(read_split(args.split_file))
    args.networks = [Network(*words, file) for words, file in zip(args.network, crf_files, strict=True)]
    args.val_names = list(read_split(args.val_split_file)) if args.network else ()
    args.val_image_root = args.val_image_root or args.image_root
    args.val_gt_root = args.val_gt_root or args.gt_root
    results = Results(**{field.name: getattr(args, field.name) for field in fields(Results)})
    page = render(results, args.images)
    write_file(args.output, page.encode(errors="replace"))  # a recorded path may not be UTF-8
    print(f"wrote {args.output}")


if __name__ == "__main__":
    command(main)
