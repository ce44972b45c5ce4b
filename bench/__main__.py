"""python -m bench cams: throughput and memory beside the way the public project works."""
import argparse
import json
from pathlib import Path

import clip
from bench import cams
from pipeline.flags import HelpFormatter
from pipeline.run import command


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=cams.__doc__,
                                     formatter_class=HelpFormatter)  # fmt: skip
    parser.add_argument("what", choices=["cams"], help="the step to measure")
    parser.add_argument("--model", help="a ViT for clip.load (without it: random weights, ViT-B/16's shape)")
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda or cuda:i")
    parser.add_argument("--precision", choices=clip.PRECISIONS, default="fp32", help="of the image tower")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--images", type=int, default=5, help="timed images per number of labels")
    parser.add_argument("--json", help="write the figures to this file as well")
    args = parser.parse_args()
    result = cams.run(args.model, args.device, args.precision, args.threads, args.images)
    for key, value in result.items():
        print(f"{key:34} {value:10.3f}" if isinstance(value, float) else f"{key:34} {value:>10}")
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    command(main)
