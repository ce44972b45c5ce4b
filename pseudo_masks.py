"""Steps 1 and 2b in one command: pseudo masks from images and labels. --labels auto runs step 0 first."""

from dataclasses import replace
from pathlib import Path

from foundation.cli import Parser
from foundation.files import check_outputs
from foundation.settings import add_flags, from_args
from pipeline import shards
from pipeline.cams_cli import add_cam_flags, add_input_flags, cam_step
from pipeline.flags import LABELS_HELP
from pipeline.fused import FusedStep
from pipeline.label_scores import LabelRule
from pipeline.masks import MaskSettings, mask_defaults
from pipeline.processes import device_of
from pipeline.run import FAILED, Record, Run, check_folder, command, fingerprint
from segmentation import camfile
from segmentation.distributed import WorkFailed, together
from segmentation.labels import from_file, read_split
from tagclip.classify import LABELS, published_step, record_of, tag

AUTO = "auto"
TAGS = "tags"  # subfolder of the mask folder, for the outputs of step 0


def main() -> int:
    parser = Parser(
        description="Make pseudo masks from images and their labels, by CAMs and a dense CRF. Pixels of low "
        "confidence are 255 (ignored). With --labels auto, CLIP predicts the labels. No large intermediate "
        "files are written. The same command continues a stopped run.",
    )
    flag = parser.add_argument
    add_input_flags(flag, None, f"{LABELS_HELP}; {AUTO}: CLIP predicts the labels, as classify.py does with "
                    "its default settings")  # fmt: skip
    flag("--output", "--pseudo_mask_save_path", required=True, metavar="DIR", help="folder for the masks")
    flag("--keep_cams", choices=["none", *camfile.FORMATS], default="none", help="also write the CAM files")
    flag("--cam_dir", "--cam_out_dir", metavar="DIR", help="folder for the CAM files (default: `cams` in the "
         "mask folder); with --shards the result shards contain masks and CAMs")  # fmt: skip
    add_cam_flags(parser)
    group = parser.add_argument_group("how masks are made")
    add_flags(group, MaskSettings, show={"confidence": "the preset's"})
    args = parser.parse_args()
    kept = args.keep_cams != "none"
    if args.cam_dir and (not kept or args.shards):
        parser.error("--cam_dir: requires --keep_cams full or compact, and no --shards: remove --cam_dir")
    output, cam_dir = Path(args.output), None
    if kept and not args.shards:
        cam_dir = args.cam_dir or str(output / "cams")
    if cam_dir and Path(cam_dir).resolve() == output.resolve():
        parser.error(f"--cam_dir: {cam_dir} is the folder of the masks: give the CAMs another folder")
    auto, tags = args.labels == AUTO, output / TAGS
    if auto and args.shards:
        parser.error(f"--labels {AUTO}: cannot be combined with --shards: give --labels FILE")
    if auto and cam_dir and _overlap(Path(cam_dir).resolve(), tags.resolve()):
        parser.error(f"--cam_dir: {cam_dir} overlaps with {tags}, the folder of step 0: give another folder")
    cams, names, cam_record = cam_step(parser, args, args.benchmark, cam_dir, args.keep_cams, tagged=auto)
    masks = from_args(mask_defaults(args.preset), args).on(device_of(cams.compute_settings.device))
    settings = masks.record(cam_record.settings["benchmark"], cams.settings.cam_type)
    record = Record(
        step="masks",
        settings={**settings, "keep_cams": args.keep_cams} if args.shards else settings,
        inputs={"cams": fingerprint(vars(cam_record))},
        outputs=("*.png", "*.tar", f"*{shards.FAILED}"),
        info={"crf_backend": masks.crf_backend},
    )
    with together():  # check all folders before anything is computed or removed
        check_folder(output, record, args.overwrite)
        if cam_dir:
            check_folder(cam_dir, cam_record, args.overwrite)
        if auto:
            tag_step = published_step(cams, str(tags))
            tag_record = record_of(tag_step, args.benchmark)
            check_outputs([args.split_file or cams.benchmark.split_file], [str(tags / LABELS)])
            check_folder(tags, tag_record, args.overwrite)
    code, workers = 0, cams.compute_settings.num_workers
    if auto:
        code, _ = tag(tag_step, tag_record, args.overwrite, names, LabelRule(tag_step.settings.ratio))
        with together():
            if not (tags / LABELS).read_text():
                raise WorkFailed(f"no image could be tagged: {tags / FAILED} lists the reasons")
        names = list(read_split(tags / LABELS))  # all images but those that failed
        cams = replace(cams, labels=from_file(tags / LABELS, len(cams.benchmark.classes)))
    # The record of the CAM folder is the same as that of step 1.
    run = Run(output, record, args.overwrite, {cam_dir: cam_record} if cam_dir else None)
    if args.shards:
        step = shards.ShardStep(FusedStep(cams, masks, None), args.output)
    else:
        step = FusedStep(cams, masks, args.output)
    run.map(step, names, workers)
    return run.finish() or code


def _overlap(one: Path, other: Path) -> bool:
    """Return whether either folder lies in the other."""
    return one == other or one in other.parents or other in one.parents


if __name__ == "__main__":
    command(main)
