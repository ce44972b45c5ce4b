"""python -m bench cams|crf|eval|pipeline|tags|train: speed and memory, compared with a reference."""

import json
from pathlib import Path

import clip
from bench import cams, crf, evaluation, fused, tags, train
from bench.measure import Setting, table
from deeplab.recipe import NETWORKS
from foundation.cli import Parser
from foundation.settings import count
from pipeline.run import command
from segmentation.inference import PRECISIONS

SUBCOMMANDS = {
    "cams": cams, "crf": crf, "eval": evaluation, "pipeline": fused, "tags": tags, "train": train
}  # fmt: skip
TRAINING = ("network", "width", "crop", "batch", "accumulate", "variants")  # settings that only train uses
NOT_TRAINING = ("precision", "images", "model", "backend")  # settings that train does not use


def main() -> int:
    defaults = Setting()
    parser = Parser(
        prog="python -m bench",
        description="Measure the speed and memory of a step, in turns with a plain version that works like "
        "the reference implementation. Also measure the fraction of the machine's peak rate that each stage "
        "reaches. "
        + " ".join(f"{name}: {module.__doc__}" for name, module in SUBCOMMANDS.items()),
    )
    flag = parser.add_argument
    flag("what", choices=SUBCOMMANDS, help="the step to measure")
    flag("--device", default=defaults.device, help="auto, cpu, cuda or cuda:i")
    flag("--precision", choices=clip.PRECISIONS, default=defaults.precision, help="precision of the "
         "image tower; the reference uses float32. For train see --variants")  # fmt: skip
    flag("--threads", type=int, default=defaults.threads, help="CPU threads of PyTorch and OpenCV")
    flag("--images", type=int, default=defaults.images, help="images timed per round. On a CPU, "
         "cams, pipeline and tags require a multiple of --threads; a GPU needs thousands. train always times "
         "one iteration")  # fmt: skip
    flag("--rounds", type=int, default=defaults.rounds, help="number of rounds; each round runs both "
         "versions once, and the medians are reported")  # fmt: skip
    flag("--labels", type=float, default=defaults.labels, help="mean labels per image (VOC12 has 1.5, "
         "COCO14 2.9); for tags, crops per image")  # fmt: skip
    flag("--model", metavar="FILE", help="checkpoint of a ViT (default: random weights, ViT-B/16's shape)")
    flag("--backend", default=defaults.backend, help="backend of the dense CRF")
    flag("--network", choices=NETWORKS, default=defaults.network, help="network to train")
    flag("--width", type=count, default=defaults.width, help="channels of the network's first convolution")
    flag("--crop", type=count, help="side of a training sample in pixels (default: as published)")
    flag("--batch", type=count, help="images per batch (default: 1 on a CPU, 5 on a GPU)")
    flag("--accumulate", type=count, help="batches per iteration (default: 1 on a CPU, 2 on a GPU)")
    flag("--variants", nargs="+", metavar="WORD", default=defaults.variants, help="precision and options "
         f"of train: one or more of {', '.join(PRECISIONS)}, each followed by any of "
         f"+{', +'.join(train.WORDS)}")  # fmt: skip
    flag("--json", metavar="FILE", help="also write the results to FILE")
    args = vars(parser.parse_args())
    what, file = args.pop("what"), args.pop("json")
    others = NOT_TRAINING if what == "train" else TRAINING
    settings = {key: value for key, value in args.items() if key not in others}
    result = {"what": what, **settings, **SUBCOMMANDS[what].run(Setting(**args))}
    print(table(result))
    if file:
        Path(file).write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    command(main)
