"""A page to look at: what the steps made of a data set, in pictures and scores.

`python -m pipeline.report --help`. The page is one HTML file: pictures are inside it, nothing is fetched.
"""
import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import jinja2
import numpy as np

from common.files import replacing
from pipeline import pictures, records
from pipeline.evaluate import benchmark_scores, scored_names
from pipeline.masks import MaskJob, refine_labels
from pipeline.run import command, read_settings
from refinement.densecrf import Preset
from segmentation import benchmark as benchmarks
from segmentation import camfile
from segmentation.benchmark import IGNORE, Benchmark
from segmentation.images import find_image, read_rgb
from segmentation.labels import Split, read_split
from segmentation.masks import mask_class_ids, read_mask
from segmentation.metrics import confusion

STAGES = ("Initial CAM", "Refined CAM", "Dense CRF")  # in the order of --scores
MASKS, FROM_TAGS = "Pseudo mask", "Mask from tags"  # in the order of --auto_scores
SEES_LABELS, SEES_IMAGE = "given the image's labels", "given the image alone"


@dataclass(frozen=True)
class FromTags:
    """Masks made without annotation, of the labels that step 0 found.

    Attributes:
        mask_dir: the masks.
        label_file: the labels, lines `name index index ...`.
        tag_scores: JSON of how well these were found; None where that is not known.
        mask_scores: JSON of the scores of the pseudo masks of true labels and of these, or none.
    """

    mask_dir: str
    label_file: str
    tag_scores: str | None = None
    mask_scores: Sequence[str] = ()


@dataclass(frozen=True)
class Sources:
    """Where the images and the results of each step lie.

    Attributes:
        benchmark: the data set.
        image_root: folder of the images.
        cam_dir: CAM files with the types `highres` and `attn_highres` (step 1 with --keep_initial).
        mask_dir: pseudo masks.
        gt_root: ground-truth masks; None where there are none.
        from_tags: masks of the same images without annotation, if there are any.
    """

    benchmark: Benchmark
    image_root: str
    cam_dir: str
    mask_dir: str
    gt_root: str | None = None
    from_tags: FromTags | None = None


@dataclass(frozen=True)
class Network:
    """What a trained network made of the validation images.

    Attributes:
        title: of its column.
        mask_dir: masks that it predicted.
        score_file: JSON of their scores, such as `python -m deeplab.test` writes.
        crf_file: JSON of the scores after a dense CRF, told beside them; None where there are none.
    """

    title: str
    mask_dir: str
    score_file: str
    crf_file: str | None = None


@dataclass(frozen=True)
class Validation:
    """Images that no network was trained on.

    Attributes:
        names: image ids.
        image_root, gt_root: folders of the images and of the ground-truth masks.
        networks: what is shown of them, in this order.
        score_files: JSON of the refined CAM and of the CRF on the same images, or none.
    """

    names: Sequence[str]
    image_root: str
    gt_root: str
    networks: Sequence[Network]
    score_files: Sequence[str] = ()

    def __post_init__(self):
        if len({network.title for network in self.networks}) < len(self.networks):
            raise ValueError("two networks have the same title: give each one of its own")


def mask_score(mask_dir: str, gt_root: str, name: str, benchmark: Benchmark) -> float:
    """The mIoU of one mask over the classes (or their groups) that its image has, pixels of 255 left out.

    NaN where the mask holds nothing else.

    Raises:
        FileNotFoundError, ValueError: a mask is missing, cannot be read, or does not fit the ground truth.
    """
    file = Path(mask_dir) / f"{name}.png"
    truth, mask = read_mask(Path(gt_root) / f"{name}.png"), read_mask(file)
    try:
        return benchmark_scores(confusion(truth, mask, benchmark.channels), benchmark)["Mean IoU"]
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def spread(names: Sequence[str], count: int) -> list[str]:
    """`count` of `names` at even steps, first and last among them."""
    steps = np.linspace(0, len(names) - 1, min(count, len(names)))
    return [names[round(step)] for step in steps]


def best_to_worst(ious: dict[str, float], count: int) -> list[str]:
    """`count` names at even steps from the highest mIoU to the lowest, NaN among these."""
    return spread(sorted(ious, key=lambda name: -np.nan_to_num(ious[name])), count)


def mask_job(sources: Sources) -> MaskJob:
    """How the pseudo masks were made, as their folder records it; the defaults where it does not."""
    made = read_settings(sources.mask_dir).get("settings", {})
    job = MaskJob(sources.benchmark, sources.cam_dir, sources.image_root, output=None)
    return replace(
        job,
        cam_type=made.get("cam_type", job.cam_type),
        confidence=made.get("confidence", job.confidence),
        crf=Preset(**made["crf"]) if "crf" in made else job.crf,
    )


def compared(found: Sequence[int], true: Sequence[int], classes: Sequence[str]) -> list[tuple[str, str]]:
    """Names of tags, and what to say of each: "" if it is true, "missed", "wrong"."""
    told = [(key, "" if key in found else "missed") for key in true]
    told += [(key, "wrong") for key in found if key not in true]
    return [(classes[key], word) for key, word in told]


def sample(sources: Sources, name: str, job: MaskJob, tags: Split | None = None) -> dict:
    """What the page shows of one image, pictures as data addresses.

    Args:
        sources: see there.
        name: of the image.
        job: how its pseudo mask was made.
        tags: the labels that step 0 found, where `sources` has masks from them.

    Raises:
        FileNotFoundError, ValueError: a file or a line that is missing, or cannot be read.
    """
    benchmark, palette = sources.benchmark, pictures.colours(sources.benchmark)
    image = read_rgb(find_image(sources.image_root, name))
    try:
        keys, initial = camfile.read(sources.cam_dir, name, "highres")
    except ValueError as error:
        raise ValueError(f"{error}; step 1 stores the initial CAM, highres, with --keep_initial") from None
    _, refined = camfile.read(sources.cam_dir, name, "attn_highres")
    crf, _ = refine_labels(image, *camfile.read(sources.cam_dir, name, job.cam_type), job)
    mask = read_mask(Path(sources.mask_dir) / f"{name}.png")
    shown = {
        "name": name,
        "image": pictures.photo(image),
        "cams": [
            {
                "name": benchmark.classes[key],
                "initial": pictures.photo(pictures.heat(image, before)),
                "refined": pictures.photo(pictures.heat(image, after)),
            }
            for key, before, after in zip(keys, initial, refined, strict=True)
        ],
        "crf": pictures.label_picture(crf, palette),
        "mask": pictures.label_picture(mask, palette),
        "unsure": float((mask == IGNORE).mean()),
        "iou": None,
        "truth": None,
        "from_tags": None,
    }
    if sources.from_tags:
        folder = sources.from_tags.mask_dir
        mask = read_mask(Path(folder) / f"{name}.png")
        if name not in tags:
            raise ValueError(f"{sources.from_tags.label_file} has no line of image {name}")
        if mask_class_ids(Path(folder) / f"{name}.png") not in (None, tags[name]):
            raise ValueError(
                f"the mask of {name} in {folder} was made of other labels than those in "
                f"{sources.from_tags.label_file}: make the masks again, or restore the labels"
            )
        shown["from_tags"] = {
            "tags": compared(tags[name], keys, benchmark.classes),
            "mask": pictures.label_picture(mask, palette),
            "unsure": float((mask == IGNORE).mean()),
            "iou": None,
        }
    if sources.gt_root is not None:
        shown["truth"] = pictures.label_picture(read_mask(Path(sources.gt_root) / f"{name}.png"), palette)
        shown["iou"] = mask_score(sources.mask_dir, sources.gt_root, name, benchmark)
        if sources.from_tags:
            shown["from_tags"]["iou"] = mask_score(folder, sources.gt_root, name, benchmark)
    return shown


def predictions(validation: Validation, benchmark: Benchmark, images: int) -> list[dict]:
    """What the page shows of the validation images: pictures as data addresses, and each mask's mIoU.

    They are taken at even steps from the best to the worst mask of the first network.
    """
    palette = pictures.colours(benchmark)

    def iou(network: Network, name: str) -> float:
        return mask_score(network.mask_dir, validation.gt_root, name, benchmark)

    def picture(folder: str, name: str) -> str:
        return pictures.label_picture(read_mask(Path(folder) / f"{name}.png"), palette)

    first = {name: iou(validation.networks[0], name) for name in validation.names}
    return [
        {
            "name": name,
            "image": pictures.photo(read_rgb(find_image(validation.image_root, name))),
            "masks": [
                {"title": network.title, "mask": picture(network.mask_dir, name), "iou": iou(network, name)}
                for network in validation.networks
            ],
            "truth": picture(validation.gt_root, name),
        }
        for name in best_to_worst(first, images)
    ]


def render(
    sources: Sources,
    names: Sequence[str],
    score_files: Sequence[str] = (),
    images: int = 8,
    validation: Validation | None = None,
) -> str:
    """The page.

    Args:
        sources: see there.
        names: all image ids of the split.
        score_files: JSON of the initial CAM, the refined CAM and the CRF, or none.
        images: how many are shown. With ground truth they are taken at even steps from the best to the
            worst pseudo mask (mask from tags where there is one), without it at even steps through the split.
        validation: what networks made of other images, if any were trained.

    Returns:
        HTML.

    Raises:
        FileNotFoundError, ValueError: a file that is missing or cannot be read.
    """
    benchmark, job, tagged = sources.benchmark, mask_job(sources), sources.from_tags
    tags = read_split(tagged.label_file, len(benchmark.classes)) if tagged else None
    if sources.gt_root is not None:
        folders = (tagged.mask_dir if tagged else sources.mask_dir, sources.gt_root)
        ious = {name: mask_score(*folders, name, benchmark) for name in names}
        chosen = best_to_worst(ious, images)
        order = f"from the best {'mask from tags' if tagged else 'pseudo mask'} to the worst"
    else:
        chosen = spread(names, images)
        order = "through the split"
    tag_scores, tagged_count = None, 0
    if tagged and tagged.tag_scores:
        tag_scores, tagged_count = records.read_tag_scores(tagged.tag_scores)
    classes = ["background"] * benchmark.has_background + list(benchmark.classes)
    legend = [
        {"name": name, "colour": pictures.css(colour)}
        for name, colour in zip(classes, pictures.colours(benchmark), strict=False)
    ]
    groups = [{"name": name, "colour": None} for name in benchmark.group_names] if benchmark.groups else None
    ramp = pictures.heat(np.full((1, 9, 3), 160, np.uint8), np.linspace(0, 1, 9)[None])[0]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("report.html.j2").render(
        benchmark=benchmark,
        image_count=len(names),
        tagged=tagged,
        tag_scores=tag_scores,
        tagged_count=tagged_count,
        scored=_scored(names, sources, score_files, validation),
        score_rows=groups or legend,
        choice=f"{len(chosen)} of {len(names)} images, at even steps {order}.",
        legend=legend,
        heat_colours=[pictures.css(colour) for colour in ramp],
        confidence=f"{job.confidence:g}",
        samples=[sample(sources, name, job, tags) for name in chosen],
        validation=validation,
        predictions=predictions(validation, benchmark, images) if validation else [],
        records=recorded(sources, validation.networks if validation else ()),
    )


def _scored(
    names: Sequence[str], sources: Sources, score_files: Sequence[str], validation: Validation | None
) -> list[dict]:
    """The splits that there are scores of, and their stages; `sees` is what a stage is given of an image."""
    classes = scored_names(sources.benchmark)

    def stages(titles: Sequence[str], files: Sequence[str], sees: str) -> list[dict]:
        return [
            records.read_stage(title, file, classes) | {"sees": sees}
            for title, file in zip(titles, files, strict=True)
        ]

    found, shown = [], []
    if score_files:
        # Without masks from tags there is nothing on the same images to tell them from.
        shown += stages(STAGES, score_files, SEES_LABELS if sources.from_tags else "")
    if sources.from_tags and sources.from_tags.mask_scores:
        with_labels, without = sources.from_tags.mask_scores
        shown += stages([MASKS], [with_labels], SEES_LABELS) + stages([FROM_TAGS], [without], SEES_IMAGE)
    if shown:
        found.append({"title": f"{len(names)} training images", "stages": shown})
    if validation:
        shown = stages(STAGES[1:], validation.score_files, SEES_LABELS) if validation.score_files else []
        for network in validation.networks:
            shown += stages([network.title], [network.score_file], SEES_IMAGE)
            if network.crf_file:
                after = records.read_stage(network.title, network.crf_file, classes)["mean"]
                shown[-1]["note"] = f"{100 * after:.1f} % after a dense CRF"
        found.append({"title": f"{len(validation.names)} validation images", "stages": shown})
    return found


def recorded(sources: Sources, networks: Sequence[Network]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Title and rows of what each step recorded; once what is the same of all masks or networks, and the
    versions."""
    tagged = sources.from_tags
    tags = {"Step 0, tags": [read_settings(Path(tagged.label_file).parent)]} if tagged else {}
    cams = {"Step 1, CAMs": [read_settings(sources.cam_dir)]}
    masks = {"Step 2b, pseudo masks": [read_settings(sources.mask_dir)]}
    if tagged:
        masks["Step 2b, masks from tags"] = [read_settings(tagged.mask_dir)]
    trained = {f"Step 3, {network.title}": _training_and_test(network) for network in networks}
    tables = _tables(tags) | _tables(cams) | records.apart("Step 2b, all masks", _tables(masks))
    tables |= records.apart("Step 3, all networks", _tables(trained))
    versions = {}
    for record in chain(*(tags | cams | masks | trained).values()):
        versions |= record.get("versions", {})
    return [(title, list(rows.items())) for title, rows in (tables | {"Versions": versions}).items() if rows]


def _tables(steps: dict[str, list[dict]]) -> dict[str, dict[str, str]]:
    return {title: records.rows(parts) for title, parts in steps.items()}


def _training_and_test(network: Network) -> list[dict]:
    """What was recorded beside a network's checkpoint, which its scores may name, and beside its masks."""
    checkpoint = json.loads(Path(network.score_file).read_text()).get("checkpoint")
    training = read_settings(Path(checkpoint).parent) if checkpoint else {}
    return [training, read_settings(network.mask_dir)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a page of pictures and scores: one HTML file.")
    flag = parser.add_argument
    flag("--dataset", required=True, metavar="NAME|FILE.yaml", help="benchmark: voc12, coco14, cocostuff, "
         "shapes or a YAML file")  # fmt: skip
    flag("--img_root", required=True, help="image folder")
    flag("--split_file", required=True, help="image ids, one a line")
    flag("--cam_out_dir", required=True, help="CAM files that step 1 made with --keep_initial")
    flag("--pseudo_mask_dir", required=True, help="pseudo masks that step 2b made")
    flag("--gt_root", help="folder of the ground-truth masks, if there are any")
    flag("--scores", nargs=3, default=(), metavar=("INITIAL.json", "REFINED.json", "CRF.json"),
         help="what the evaluations wrote with --json")  # fmt: skip
    flag("--out", default="output/report.html", help="the page")
    flag("--images", type=int, default=8, help="images shown of each split")
    flag = parser.add_argument_group("what is made of the same images without labels").add_argument
    flag("--auto_masks", nargs=2, metavar=("MASK_DIR", "LABELS.txt"),
         help="masks and the labels that step 0 found for them; pseudo_masks.py --labels auto leaves the "
         "labels in MASK_DIR/tags/labels.txt")  # fmt: skip
    flag("--auto_tags", metavar="TAGS.json",
         help="how right these labels are: what classify.py wrote with --json")  # fmt: skip
    flag("--auto_scores", nargs=2, default=(), metavar=("MASKS.json", "AUTO_MASKS.json"),
         help="what eval_cam.py --cam_type png wrote of --pseudo_mask_dir and of these masks")  # fmt: skip
    flag = parser.add_argument_group("what trained networks (step 3) make of other images").add_argument
    flag("--network", nargs=3, action="append", default=[], metavar=("TITLE", "MASK_DIR", "SCORES.json"),
         help="what the test of a network wrote; may be given several times")  # fmt: skip
    flag("--network_crf", nargs="+", metavar="SCORES.json",
         help="scores of each --network after a dense CRF, in their order")  # fmt: skip
    flag("--val_split_file", help="image ids of these images, one a line")
    flag("--val_img_root", help="their folder (without it: --img_root)")
    flag("--val_gt_root", help="folder of their ground-truth masks (without it: --gt_root)")
    flag("--val_scores", nargs=2, default=(), metavar=("REFINED.json", "CRF.json"),
         help="what steps 2a and 2b, which see the labels, score on them")  # fmt: skip
    args = parser.parse_args()
    validation = None
    if args.network:
        gt_root = args.val_gt_root or args.gt_root
        if not (args.val_split_file and gt_root):
            parser.error("--network needs --val_split_file, and --val_gt_root or --gt_root")
        refined = args.network_crf or [None] * len(args.network)
        if len(refined) != len(args.network):
            parser.error("--network_crf needs one file for each --network")
        validation = Validation(
            list(read_split(args.val_split_file)),
            args.val_img_root or args.img_root,
            gt_root,
            [Network(*words, file) for words, file in zip(args.network, refined, strict=True)],
            args.val_scores,
        )
    elif any((args.network_crf, args.val_split_file, args.val_img_root, args.val_gt_root, args.val_scores)):
        parser.error("--network_crf and the --val_ flags go with --network")
    from_tags = None
    if args.auto_masks:
        from_tags = FromTags(*args.auto_masks, args.auto_tags, args.auto_scores)
    elif args.auto_tags or args.auto_scores:
        parser.error("--auto_tags and --auto_scores go with --auto_masks")
    sources = Sources(
        benchmarks.load(args.dataset),
        args.img_root,
        args.cam_out_dir,
        args.pseudo_mask_dir,
        args.gt_root,
        from_tags,
    )
    page = render(sources, list(read_split(args.split_file)), args.scores, args.images, validation)
    with replacing(args.out) as stream:
        stream.write(page.encode())
    print(f"wrote {args.out}")


if __name__ == "__main__":
    command(main)
