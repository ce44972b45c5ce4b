"""Step 2b, CAMs to pseudo masks by the dense CRF: python eval_cam_with_crf.py --help"""

import argparse

from pipeline.evaluate import benchmark_of
from pipeline.flags import HelpFormatter, add_crf_flags, add_preset_flag, confidence, count, crf_preset
from pipeline.masks import MaskJob, make_masks
from pipeline.processes import cores
from pipeline.run import command
from segmentation.labels import split_of


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Step 2b: CAMs refined by a dense CRF, written as pseudo masks in which pixels of low "
        "confidence are 255. A stopped run is continued by the same command.",
        formatter_class=HelpFormatter,
    )
    flag = parser.add_argument
    flag("--cam_out_dir", default="./cam_out", help="folder of the CAM files, full or compact")
    flag("--cam_type", default="attn_highres", help="maps to refine")
    flag("--pseudo_mask_save_path", metavar="DIR", help="folder for the masks, made if missing")
    flag("--image_root", help="image folder (without it: the benchmark's)")
    flag("--split_file", help="image ids, one a line (without it: the benchmark's)")
    flag("--gt_root", help="folder of ground-truth masks; with it the masks are scored too, without it only "
         "--eval_only needs one (the benchmark's)")  # fmt: skip
    flag("--eval_only", action="store_true", help="write no masks; score the CRF's labels before any becomes "
         "255, as published")  # fmt: skip
    flag("--dataset", metavar="NAME|FILE.yaml", help="voc12, coco14, cocostuff, shapes or a YAML file "
         "(without it: the one recorded in the CAM folder)")  # fmt: skip
    flag("--cam_eval_thres", type=float, default=2.0, help="accepted and unused, as in the public script: "
         "the CRF's background is always 1 - the highest CAM")  # fmt: skip
    flag("--json", metavar="FILE", help="write the scores there")
    flag("--allow_missing", action="store_true", help="leave out images that lack a CAM")
    flag("--overwrite", action="store_true", help="start anew in a folder filled with other settings")
    flag("--num_workers", type=count, default=cores(), help="processes")
    flag("--device", default="auto", help="of the torch backend: auto, cpu, cuda or cuda:i")
    add_preset_flag(parser)
    add_crf_flags(parser, "numba")
    args = parser.parse_args()
    if not (args.eval_only or args.pseudo_mask_save_path):
        parser.error("give --pseudo_mask_save_path DIR for the masks, or --eval_only for scores alone")
    if args.json and not (args.eval_only or args.gt_root):
        parser.error("--json holds scores: give --gt_root, or --eval_only")
    name, benchmark = benchmark_of(args.cam_out_dir, args.dataset)
    gt_root = args.gt_root
    if args.eval_only and not gt_root:
        gt_root = str(benchmark.path(benchmark.mask_dir))
    job = MaskJob(
        benchmark=benchmark,
        cam_dir=args.cam_out_dir,
        image_root=args.image_root or str(benchmark.path(benchmark.image_dir)),
        output=None if args.eval_only else args.pseudo_mask_save_path,
        gt_root=gt_root,
        cam_type=args.cam_type,
        confidence=confidence(args),
        crf=crf_preset(args),
        backend=args.crf_backend,
        device=args.device,
        max_pixels=args.crf_max_pixels,
    )
    names = list(split_of(benchmark, args.split_file))
    return make_masks(
        job, names, name, args.json, args.allow_missing, args.overwrite, num_workers=args.num_workers
    )


if __name__ == "__main__":
    command(main)
