"""A page to look at: what steps 1, 2a and 2b made of a data set, in pictures and scores.

`python -m pipeline.report --help`. The page is one HTML file: pictures are inside it, nothing is fetched.
"""
import argparse
import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import jinja2
import numpy as np
from PIL import Image

from pipeline.masks import MaskJob, refine_labels
from pipeline.run import command, read_settings
from refinement.densecrf import Preset
from segmentation import benchmark as benchmarks
from segmentation import camfile
from segmentation.benchmark import IGNORE, Benchmark
from segmentation.files import replacing
from segmentation.images import find_image, read_rgb
from segmentation.labels import read_split
from segmentation.masks import read_mask
from segmentation.metrics import confusion, scores

STAGES = ("Initial CAM", "Refined CAM", "Dense CRF")  # in the order of --scores
SIDE = 320  # pixels of a picture's longer side: sharp on a dense screen at the width it is shown
HEAT = cv2.COLORMAP_TURBO
OPACITY, FAINT = 0.7, 0.4  # of CAMs over images, and the activation below which it fades
BACKGROUND = (238, 240, 243)  # VOC paints background black, which shouts on a white page
HATCH = 8  # pixels from one stripe of "unsure" to the next
JPEG = {"format": "JPEG", "quality": 88, "subsampling": 0}
PNG = {"format": "PNG", "optimize": True}


@dataclass(frozen=True)
class Sources:
    """Where the images and the results of each step lie.

    Attributes:
        benchmark: the data set.
        image_root: folder of the images.
        cam_dir: CAM files with the types `highres` and `attn_highres` (step 1 with --keep_initial).
        mask_dir: pseudo masks.
        gt_root: ground-truth masks; None where there are none.
    """

    benchmark: Benchmark
    image_root: str
    cam_dir: str
    mask_dir: str
    gt_root: str | None = None


def mask_score(sources: Sources, name: str) -> float:
    """The mIoU of one pseudo mask over the classes that its image has; pixels of 255 are left out."""
    truth = read_mask(Path(sources.gt_root) / f"{name}.png")
    mask = read_mask(Path(sources.mask_dir) / f"{name}.png")
    return scores(confusion(truth, mask, sources.benchmark.channels))["Mean IoU"]


def spread(names: Sequence[str], count: int) -> list[str]:
    """`count` of `names` at even steps, first and last among them."""
    steps = np.linspace(0, len(names) - 1, min(count, len(names)))
    return [names[round(step)] for step in steps]


def heat(image: np.ndarray, cam: np.ndarray) -> np.ndarray:
    """A CAM over its image, whose colours step back.

    Args:
        image: (H, W, 3) uint8 RGB.
        cam: (H, W) in [0, 1].

    Returns:
        (H, W, 3) uint8 RGB.
    """
    cam = np.float32(cam)
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None]
    glow = cv2.applyColorMap(np.rint(cam * 255).astype(np.uint8), HEAT)[..., ::-1]
    weight = OPACITY * np.minimum(cam / FAINT, 1)[..., None]  # where there is no activation, see the image
    return np.rint(grey * (1 - weight) + glow * weight).astype(np.uint8)


def paint(labels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """An index mask in its palette's colours, background pale and 255 hatched.

    Args:
        labels: (H, W) uint8.
        palette: (256, 3) uint8, as `colours` gives it.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    y, x = np.indices(labels.shape)
    stripe = np.where((x + y) % HATCH < HATCH // 3, 140, 255).astype(np.uint8)
    return np.where((labels == IGNORE)[..., None], stripe[..., None], palette[labels])


def colours(benchmark: Benchmark) -> np.ndarray:
    """(256, 3) uint8: the benchmark's palette, its black background exchanged for a pale one."""
    palette = benchmark.palette.copy()
    if benchmark.has_background:
        palette[0] = BACKGROUND
    return palette


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


def sample(sources: Sources, name: str, job: MaskJob) -> dict:
    """What the page shows of one image, pictures as data addresses."""
    benchmark, palette = sources.benchmark, colours(sources.benchmark)
    image = read_rgb(find_image(sources.image_root, name))
    try:
        keys, initial = camfile.read(sources.cam_dir, name, "highres")
    except ValueError as error:
        raise ValueError(f"{error}; step 1 stores the initial CAM, highres, with --keep_initial") from None
    _, refined = camfile.read(sources.cam_dir, name, "attn_highres")
    crf, _ = refine_labels(image, *camfile.read(sources.cam_dir, name, job.cam_type), job)
    mask = read_mask(Path(sources.mask_dir) / f"{name}.png")
    size = _shown_size(image.shape[:2])

    def photo(pixels: np.ndarray) -> str:
        return _embed(_resize(pixels, size, cv2.INTER_CUBIC), JPEG)

    def labels(indices: np.ndarray) -> str:
        return _embed(paint(_resize(indices, size, cv2.INTER_NEAREST), palette), PNG)

    shown = {
        "name": name,
        "image": photo(image),
        "cams": [
            {
                "name": benchmark.classes[key],
                "initial": photo(heat(image, before)),
                "refined": photo(heat(image, after)),
            }
            for key, before, after in zip(keys, initial, refined, strict=True)
        ],
        "crf": labels(crf),
        "mask": labels(mask),
        "unsure": float((mask == IGNORE).mean()),
        "iou": None,
        "truth": None,
    }
    if sources.gt_root is not None:
        shown["truth"] = labels(read_mask(Path(sources.gt_root) / f"{name}.png"))
        shown["iou"] = mask_score(sources, name)
    return shown


def read_stage(title: str, file: str | Path, classes: Sequence[str]) -> dict:
    """One column of the page's scores.

    Args:
        title: of the column.
        file: what `eval_cam.py --json` or `eval_cam_with_crf.py --eval_only --json` wrote.
        classes: names it must have scores of.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds no scores, or those of other classes.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"score file {file} does not exist: evaluation writes it with --json")
    try:
        best = json.loads(Path(file).read_text())["best"]
        chosen = best.get("background")  # an exponent from 1 on, a constant below; see `pipeline.evaluate`
        note = "" if chosen is None else f"background {'exponent' if chosen >= 1 else 'score'} {chosen:g}"
        ious = {name: best["Class IoU"][name] for name in classes}
        return {"title": title, "mean": best["Mean IoU"], "classes": ious, "note": note}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{file} holds no scores of these classes: give what evaluation wrote with --json"
        ) from None


def render(sources: Sources, names: Sequence[str], score_files: Sequence[str] = (), images: int = 8) -> str:
    """The page.

    Args:
        sources: see there.
        names: all image ids of the split.
        score_files: JSON of the initial CAM, the refined CAM and the CRF, or none.
        images: how many are shown. With ground truth they are taken at even steps from the best to the
            worst pseudo mask, without it at even steps through the split.

    Returns:
        HTML.

    Raises:
        FileNotFoundError, ValueError: a file that is missing or cannot be read.
    """
    if sources.gt_root is not None:
        ious = {name: mask_score(sources, name) for name in names}
        chosen = spread(sorted(names, key=lambda name: -np.nan_to_num(ious[name])), images)
        order = "from the best pseudo mask to the worst"
    else:
        chosen = spread(names, images)
        order = "through the split"
    benchmark, job = sources.benchmark, mask_job(sources)
    classes = ["background"] * benchmark.has_background + list(benchmark.classes)
    ramp = heat(np.full((1, 9, 3), 160, np.uint8), np.linspace(0, 1, 9)[None])[0]
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
        stages=[read_stage(title, file, classes) for title, file in zip(STAGES, score_files, strict=False)],
        choice=f"{len(chosen)} of {len(names)} images, at even steps {order}.",
        legend=[
            {"name": name, "colour": _css(colour)}
            for name, colour in zip(classes, colours(benchmark), strict=False)
        ],
        heat_colours=[_css(colour) for colour in ramp],
        confidence=f"{job.confidence:g}",
        samples=[sample(sources, name, job) for name in chosen],
        records=_records(sources),
    )


def _records(sources: Sources) -> list[tuple[str, list[tuple[str, str]]]]:
    """Title and rows of what each step recorded; the versions once."""
    tables, versions = [], {}
    for title, folder in (("Step 1, CAMs", sources.cam_dir), ("Step 2b, pseudo masks", sources.mask_dir)):
        record = read_settings(folder)
        inputs = {f"sha256 of {name}": digest for name, digest in record.get("inputs", {}).items()}
        rows = record.get("settings", {}) | inputs
        if rows:
            tables.append((title, [(key.replace("_", " "), _told(value)) for key, value in rows.items()]))
        versions |= record.get("versions", {})
    if versions:
        tables.append(("Versions", list(versions.items())))
    return tables


def _told(value) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {_told(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(_told(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _css(colour: np.ndarray) -> str:
    return "#" + bytes(int(channel) for channel in colour).hex()


def _shown_size(size: tuple[int, int]) -> tuple[int, int]:
    factor = SIDE / max(size)
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def _resize(pixels: np.ndarray, size: tuple[int, int], interpolation: int) -> np.ndarray:
    shrinks = size[0] < pixels.shape[0] and interpolation != cv2.INTER_NEAREST
    return cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_AREA if shrinks else interpolation)


def _embed(pixels: np.ndarray, options: dict) -> str:
    """A picture as data address."""
    image = Image.fromarray(pixels)
    if options["format"] == "PNG":
        image = image.quantize(256)  # few colours each: exact, and a third of the size
    stream = io.BytesIO()
    image.save(stream, **options)
    return f"data:image/{options['format'].lower()};base64,{base64.b64encode(stream.getvalue()).decode()}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a page of pictures and scores: one HTML file.")
    flag = parser.add_argument
    flag("--dataset", required=True, metavar="NAME|FILE.yaml", help="voc12, coco14, shapes or a YAML file")
    flag("--img_root", required=True, help="image folder")
    flag("--split_file", required=True, help="image ids, one a line")
    flag("--cam_out_dir", required=True, help="CAM files that step 1 made with --keep_initial")
    flag("--pseudo_mask_dir", required=True, help="pseudo masks that step 2b made")
    flag("--gt_root", help="folder of the ground-truth masks, if there are any")
    flag("--scores", nargs=3, default=(), metavar=("INITIAL.json", "REFINED.json", "CRF.json"),
         help="what the evaluations wrote with --json")  # fmt: skip
    flag("--out", default="output/report.html", help="the page")
    flag("--images", type=int, default=8, help="images shown")
    args = parser.parse_args()
    sources = Sources(
        benchmarks.load(args.dataset), args.img_root, args.cam_out_dir, args.pseudo_mask_dir, args.gt_root
    )
    page = render(sources, list(read_split(args.split_file)), args.scores, args.images)
    with replacing(args.out) as stream:
        stream.write(page.encode())
    print(f"wrote {args.out}")


if __name__ == "__main__":
    command(main)
