"""Step 2b: make pseudo masks from CAMs by a dense CRF. See python eval_cam_with_crf.py --help"""

from dataclasses import replace

from foundation.cli import Parser
from foundation.settings import add_flags, count, from_args
from pipeline.evaluate import benchmark_of
from pipeline.flags import add_benchmark_flag, add_image_flags
from pipeline.masks import MaskSettings, MaskStep, add_preset_flag, make_masks, mask_defaults
from pipeline.processes import cores
from pipeline.run import command
from segmentation.labels import split_of


def main() -> int:
    parser = Parser(
        description="Step 2b: refine CAMs by a dense CRF and write pseudo masks. Pixels of low confidence "
        "are 255 (ignored). The same command continues a stopped run.",
    )
    flag = parser.add_argument
    flag("--cam_dir", "--cam_out_dir", metavar="DIR", default="./cam_out", help="folder of the CAM files, "
         "full or compact")  # fmt: skip
    flag("--cam_type", default="attn_highres", help="CAM type to refine")
    flag("--output", "--pseudo_mask_save_path", metavar="DIR", help="folder for the masks, made if missing")
    add_image_flags(flag)
    flag("--gt_root", metavar="DIR", help="folder of ground-truth masks; if given, the masks are also scored "
         "(default with --eval_only: the benchmark's)")  # fmt: skip
    flag("--eval_only", action="store_true", help="write no masks; score the labels of the CRF before pixels "
         "of low confidence become 255, as for published numbers")  # fmt: skip
    add_benchmark_flag(flag, recorded_in="the CAM folder")
    flag("--cam_eval_thres", type=float, default=2.0, metavar="X", help="has no effect, as in the reference "
         "script: the background probability of the CRF is always 1 - the highest CAM")  # fmt: skip
    flag("--json", metavar="FILE", help="JSON file for the scores")
    flag("--allow_missing", action="store_true", help="leave out images without a CAM")
    flag("--overwrite", action="store_true", help="remove the outputs of an earlier run first")
    flag("--num_workers", type=count, metavar="N", default=cores(), help="number of processes")
    flag("--device", default="auto", help="device of the torch backend: auto, cpu, cuda or cuda:i")
    add_preset_flag(flag)
    group = parser.add_argument_group("how masks are made")
    # numba is the default here: with torch, each of the processes needs its own GPU memory.
    add_flags(group, MaskSettings, show={"confidence": "the preset's", "crf_backend": "numba"})
    args = parser.parse_args()
    if not (args.eval_only or args.output):
        parser.error("give --output DIR for the masks, or --eval_only to compute only scores")
    if args.json and not (args.eval_only or args.gt_root):
        parser.error("--json writes scores, which need ground truth: give --gt_root DIR or --eval_only")
    name, benchmark = benchmark_of(args.cam_dir, args.benchmark)
    gt_root = args.gt_root
    if args.eval_only and not gt_root:
        gt_root = str(benchmark.path(benchmark.mask_dir))
    step = MaskStep(
        benchmark=benchmark,
        cam_dir=args.cam_dir,
        image_root=args.image_root or str(benchmark.path(benchmark.image_dir)),
        output=None if args.eval_only else args.output,
        gt_root=gt_root,
        cam_type=args.cam_type,
        settings=from_args(replace(mask_defaults(args.preset), crf_backend="numba"), args),
        device=args.device,
    )
    names = list(split_of(benchmark, args.split_file))
    return make_masks(step, names, name, args.json, args.allow_missing, args.overwrite, args.num_workers)


if __name__ == "__main__":
    command(main)
