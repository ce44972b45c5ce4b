"""Steps 1 and 2b in one go, images and labels to pseudo masks, with --labels auto step 0 too: see --help"""

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

import clip
from pipeline import fused, shards
from pipeline.cams_cli import LABELS_HELP, OUTPUTS, add_cam_flags, add_image_flags, add_run_flags, cam_job
from pipeline.flags import HelpFormatter, add_crf_flags, add_preset_flag, confidence, crf_preset
from pipeline.masks import MaskJob, fingerprint, mask_settings
from pipeline.run import Run, check_folder, command
from segmentation import camfile
from segmentation.distributed import together
from segmentation.labels import from_file, read_split
from tagclip.classify import Finder

AUTO = "auto"
TAGS = "tags"  # the folder, in that of the masks, of step 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Pseudo masks from images and the classes that each contains, by CAMs and a dense CRF; "
        "pixels of low confidence are 255. With --labels auto CLIP itself says what each contains. Nothing "
        "large is written between. A stopped run is continued by the same command.",
        formatter_class=HelpFormatter,
    )
    labels_help = f"{LABELS_HELP}; {AUTO}: CLIP finds them, with the defaults of classify.py"
    flag = add_image_flags(parser, None, labels_help)
    flag("--pseudo_mask_save_path", required=True, metavar="DIR", help="folder for the masks")
    flag("--keep_cams", choices=["none", *camfile.FORMATS], default="none", help="also write the CAM files")
    flag("--cam_out_dir", help="where (without it: cams in the folder of the masks); shards hold both")
    add_preset_flag(parser)
    add_run_flags(parser)
    add_cam_flags(parser)
    add_crf_flags(parser, "auto")
    args = parser.parse_args()
    kept = args.keep_cams != "none"
    if args.cam_out_dir and (not kept or args.shards):
        parser.error("--cam_out_dir: goes with --keep_cams full or compact, and without --shards")
    folder = None
    if kept and not args.shards:
        folder = args.cam_out_dir or str(Path(args.pseudo_mask_save_path) / "cams")
    if folder and Path(folder).resolve() == Path(args.pseudo_mask_save_path).resolve():
        parser.error("--cam_out_dir: give the CAMs another folder than the masks")
    auto, tags = args.labels == AUTO, Path(args.pseudo_mask_save_path) / TAGS
    if auto and args.shards:
        parser.error(f"--labels {AUTO}: goes without --shards")
    if auto and folder and _overlap(Path(folder).resolve(), tags.resolve()):
        parser.error(f"--cam_out_dir: give the CAMs a folder apart from {tags}, which is for scores of tags")
    cams, names, record = cam_job(parser, args, None, folder, args.keep_cams, found_later=auto)
    backend = args.crf_backend
    if backend == "auto":
        backend = "torch" if clip.pick_device(args.device).type == "cuda" else "numba"
    masks = MaskJob(
        benchmark=cams.benchmark,
        cam_dir=folder or "",
        image_root=cams.image_root,
        output=args.pseudo_mask_save_path,
        cam_type=fused.cam_type(cams.settings),
        confidence=confidence(args),
        crf=crf_preset(args),
        backend=backend,
        max_pixels=args.crf_max_pixels,
    )
    settings = mask_settings(masks, record["settings"]["benchmark"])
    mask_run = {
        "settings": {**settings, "keep_cams": args.keep_cams} if args.shards else settings,
        "inputs": {"cams": fingerprint(record)},
        "outputs": ("*.png", "*.tar", f"*{shards.FAILED}"),
        "overwrite": args.overwrite,
        "step": "masks",
    }
    cam_run = {**record, "outputs": OUTPUTS, "overwrite": args.overwrite}
    with together():  # nothing is computed, and nothing removed, before all folders are found in order
        check_folder(args.pseudo_mask_save_path, **mask_run)
        if folder:
            check_folder(folder, **cam_run)
        if auto:
            finder = Finder(args, cams.benchmark, cams.image_root, str(tags))
            finder.check()
    code = 0
    if auto:
        code = finder.find(names)
        names = list(read_split(finder.file))  # all images but those that have failed
        cams = replace(cams, labels=from_file(finder.file, len(cams.benchmark.classes)))
    if folder:
        Run(folder, **cam_run)  # is then as step 1 would leave it
    retry = {"retry": shards.RETRY} if args.shards else {}
    run = Run(args.pseudo_mask_save_path, **mask_run, info={"crf_backend": backend}, **retry)
    workers = args.num_workers
    if args.shards:
        step = partial(fused.FusedStep, cams, masks)
        run.map(shards.generate, names, masks.output, step, num_workers=workers, counted=False)
    else:
        run.map(fused.generate, names, cams, masks, num_workers=workers, block=cams.flow.look_ahead)
    return run.finish() or code


def _overlap(one: Path, other: Path) -> bool:
    """Does either folder lie in the other?"""
    return one == other or one in other.parents or other in one.parents


if __name__ == "__main__":
    command(main)
