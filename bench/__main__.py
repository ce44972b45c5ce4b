"""python -m bench cams|crf|eval|pipeline|tags|train: speed and memory beside the public projects' way."""

import json
from pathlib import Path

import clip
from bench import cams, crf, evaluation, fused, tags, train
from bench.measure import Setting, table
from common.cli import Parser
from common.settings import count
from deeplab.recipe import NETWORKS
from pipeline.run import command
from segmentation.inference import PRECISIONS

SUBCOMMANDS = {
    "cams": cams, "crf": crf, "eval": evaluation, "pipeline": fused, "tags": tags, "train": train
}  # fmt: skip
TRAINING = ("network", "width", "crop", "batch", "accumulate", "variants")  # train's settings, ...
NOT_TRAINING = ("precision", "images", "model", "backend")  # ... and those of all the others


def main() -> int:
    usual = Setting()
    parser = Parser(
        prog="python -m bench",
        description="How fast a step is, in how much memory, beside the public way of doing it, which takes "
        "turns with it; and how near the machine's ceiling its stages come. "
        + " ".join(f"{name}: {module.__doc__}" for name, module in SUBCOMMANDS.items()),
    )
    flag = parser.add_argument
    flag("what", choices=SUBCOMMANDS, help="the step to measure")
    flag("--device", default=usual.device, help="auto, cpu, cuda or cuda:i")
    flag("--precision", choices=clip.PRECISIONS, default=usual.precision, help="of the image tower; the "
         "public way stays float32. For train see --variants")  # fmt: skip
    flag("--threads", type=int, default=usual.threads, help="CPU threads of PyTorch and OpenCV")
    flag("--images", type=int, default=usual.images, help="images timed in a round (cams, pipeline, "
         "tags on a CPU: a multiple of --threads; a GPU needs thousands); train times "
         "one iteration")  # fmt: skip
    flag("--rounds", type=int, default=usual.rounds, help="turns of both ways; medians are reported")
    flag("--labels", type=float, default=usual.labels, help="labels per image, on average: VOC12 has 1.5, "
         "COCO14 2.9; of tags: crops")  # fmt: skip
    flag("--model", metavar="FILE", help="a ViT for clip.load (without it: random weights, ViT-B/16's shape)")
    flag("--backend", default=usual.backend, help="of the dense CRF")
    flag("--network", choices=NETWORKS, default=usual.network, help="that train trains")
    flag("--width", type=count, default=usual.width, help="of the network: channels of its first convolution")
    flag("--crop", type=count, help="side of a training sample (without it: as published)")
    flag("--batch", type=count, help="images of a batch (without it: 1 on a CPU, 5 on a GPU)")
    flag("--accumulate", type=count, help="batches of an iteration (without it: 1 on a CPU, 2 on a GPU)")
    flag("--variants", nargs="+", metavar="WORD", default=usual.variants, help="how train computes: one or "
         f"more of {', '.join(PRECISIONS)}, each followed by any of +{', +'.join(train.WORDS)}")  # fmt: skip
    flag("--json", metavar="FILE", help="write the figures to this file as well")
    args = vars(parser.parse_args())
    what, file = args.pop("what"), args.pop("json")
    others = NOT_TRAINING if what == "train" else TRAINING
    told = {key: value for key, value in args.items() if key not in others}
    result = {"what": what, **told, **SUBCOMMANDS[what].run(Setting(**args))}
    print(table(result))
    if file:
        Path(file).write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    command(main)
