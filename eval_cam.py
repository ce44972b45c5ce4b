"""Step 2a: score CAMs or index masks against ground truth. See python eval_cam.py --help"""


from foundation.cli import Parser
from foundation.settings import count
from pipeline.evaluate import ARITHMETIC, MASKS, Evaluation, backgrounds, benchmark_of, evaluate
from pipeline.flags import add_benchmark_flag
from pipeline.processes import cores
from pipeline.run import command
from segmentation.labels import split_of


def main() -> int:
    parser = Parser(
        description="Step 2a: compute the mIoU of CAMs against ground truth for several background scores, "
        "in one pass over the files. Print all scores, mark the best, and print its IoU of each class.",
    )
    flag = parser.add_argument
    flag("--cam_dir", "--cam_out_dir", metavar="DIR", default="./cam_out", help="folder of the CAM files "
         "(full or compact), or of masks")  # fmt: skip
    flag("--cam_type", default="attn_highres", help="CAM type to evaluate: attn_highres, highres, another "
         f"key of the CAM files, or {MASKS} for index masks (ignored pixels, 255, are left out)")  # fmt: skip
    flag("--split_file", metavar="FILE", help="image ids, one per line (default: the benchmark's)")
    flag("--cam_eval_thres", type=float, default=2.0, metavar="X", help="background scores to try: X >= 1 "
         "tries exponents 1 and 2 (1 to 10 for CAM types without attn in their name); X < 1 tries constants "
         "0.05, 0.10, ..., 0.60")  # fmt: skip
    flag("--gt_root", metavar="DIR", help="folder of the ground-truth masks (default: the benchmark's)")
    add_benchmark_flag(flag, recorded_in="the CAM folder")
    flag("--arithmetic", choices=ARITHMETIC, default="float16", help="number type in which the scores of "
         "background and classes are compared; published numbers use float16")  # fmt: skip
    flag("--json", metavar="FILE", help="JSON file for the scores")
    flag("--allow_missing", action="store_true", help="leave out images without a CAM or ground truth")
    flag("--num_workers", type=count, metavar="N", default=cores(), help="number of processes")
    args = parser.parse_args()
    _, benchmark = benchmark_of(args.cam_dir, args.benchmark)
    evaluation = Evaluation(
        benchmark=benchmark,
        cam_dir=args.cam_dir,
        gt_root=args.gt_root or str(benchmark.path(benchmark.mask_dir)),
        cam_type=args.cam_type,
        backgrounds=backgrounds(args.cam_eval_thres, args.cam_type, benchmark.has_background),
        arithmetic=args.arithmetic,
    )
    names = list(split_of(benchmark, args.split_file))
    return evaluate(evaluation, names, args.json, args.allow_missing, args.num_workers)


if __name__ == "__main__":
    command(main)
