"""Train the small CLIP of the drawn world from scratch: `python -m shapes.train_clip --out FILE`.

Training is contrastive, on images and captions that are drawn on the fly, without pixel labels. The result
is a float16 state dict in the layout of OpenAI's checkpoints. It takes about an hour on two CPU cores. An
interrupted run continues from its last resume file and gives the same weights.

The loss has four terms. Term 1 is CLIP's loss. With term 1 alone, the class token of such a small network
gets the information about the image in early blocks, and a CAM of the last block does not localize objects.

1. Class token against captions and names, as in CLIP. In random steps, the class token and the patches do
   not attend to each other except in the last block, so that all image information in the class token
   comes from the last block's attention.
2. Patches against names: the score of a name for an image is the log-sum-exp of patch-to-name similarities
   over the patches.
3. Mean patch feature against captions and names; CLIP-ES differentiates this score.
4. Attention between patches (mean over heads and the last 8 blocks) against a target. The target connects
   patches of similar color to which the model gives the same name, out of the names in the caption. The
   attention of a large CLIP has this property without such a loss. The attention of a small CLIP is diffuse:
   it blurs a CAM instead of refining it.
"""
import csv
import math
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip.images import normalize
from clip.model import CLIP, Config
from clip.prompts import encode_prompts
from clip.tokenizer import tokenize
from foundation import logs
from foundation.cli import Parser
from foundation.settings import Settings, add_flags, from_args, setting
from foundation.tensors import read_tensors
from segmentation.checkpoints import write_tensors
from segmentation.metrics import confusion, scores
from shapes.world import BACKGROUNDS, CAPTION_TEMPLATES, CLASSES, draw

CONFIG = Config(
    embed_dim=64,
    image_resolution=96,
    vision_layers=10,  # AFFINITY_LAYERS + 2: the features of the first two blocks contain only local color
    vision_width=128,
    patch_size=8,
    context_length=77,
    vocab_size=49408,
    text_width=64,
    text_layers=2,
)
NAMES = [kind.name for kind in (*CLASSES, *BACKGROUNDS)]
MAX_SCALE = math.log(100)  # of the logits, as in CLIP
COLOR_DISTANCE = 0.5  # sigma of the Gaussian similarity of mean patch colors, in normalized units
AFFINITY_LAYERS = 8  # last blocks whose attention CLIP-ES averages
LOG_FIELDS = ("step", "loss", "caption", "patch", "mean", "attention", "recall", "probe", "seconds")


@dataclass(frozen=True)
class Recipe(Settings):
    """All settings of a training."""

    steps: int = setting(450, "training steps", least=1)
    batch: int = setting(96, "images per step", least=2)
    seed: int = setting(0, "seed of the weights, images and captions", least=0)
    learning_rate: float = setting(1e-3, "learning rate after the warm-up", above=0)
    final_rate: float = setting(1e-5, "learning rate of the last step", least=0)
    warm_up: int = setting(100, "steps in which the learning rate rises", least=1)
    weight_decay: float = setting(0.05, "weight decay of matrices", least=0)
    side: int = setting(64, "side of the images in pixels", least=1)
    big_side: int = setting(96, "side of the images in some steps, so that inference on larger images works",
                            least=1)  # fmt: skip
    big_probability: float = setting(0.25, "probability of a step with `big_side` and half the batch",
                                     least=0, most=1)  # fmt: skip
    separate_probability: float = setting(0.7, "probability of a step with a separate class token, see loss "
                                          "term 1", least=0, most=1)  # fmt: skip
    patch_weight: float = setting(0.5, "weight of loss term 2", least=0)
    mean_weight: float = setting(0.25, "weight of loss term 3", least=0)
    attention_weight: float = setting(1.0, "weight of loss term 4", least=0)


def build(seed: int) -> CLIP:
    """Return a new CLIP. Query weights start equal to key weights: attention starts as token similarity."""
    torch.manual_seed(seed)
    model = CLIP(CONFIG)
    for block in (*model.visual.transformer.resblocks, *model.transformer.resblocks):
        width = len(block.ln_1.weight)
        nn.init.normal_(block.attn.out_proj.weight, std=0.02)
        nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(block.mlp.c_proj.weight, std=0.03)
        with torch.no_grad():
            block.attn.in_proj_weight[:width] = block.attn.in_proj_weight[width : 2 * width]
    nn.init.normal_(model.token_embedding.weight, std=0.02)
    with torch.no_grad():
        # Textures have less contrast than colors: the first convolution amplifies them by 2.
        filters = model.visual.conv1.weight
        filters += filters - filters.mean((2, 3), keepdim=True)
    return model


@dataclass
class Batch:
    """The images and captions of one step."""

    images: Tensor  # (B, 3, S, S), normalized
    tags: Tensor  # (B, N) bool, whether the caption of the image has the name
    texts: list[str]  # prompts of the N names, then the B captions
    separate: bool  # whether class token and patches are separate, see loss term 1


def draw_batch(recipe: Recipe, step: int) -> Batch:
    """Return the images and captions of one step; they depend only on the recipe and the step."""
    choice = random.Random(f"{recipe.seed} {step}")
    big = choice.random() < recipe.big_probability
    separate = choice.random() < recipe.separate_probability
    side = recipe.big_side if big else recipe.side
    count = recipe.batch // 2 if big else recipe.batch
    first = step * recipe.batch
    scenes = [draw(recipe.seed, first + i, (side, side), "clip") for i in range(count)]
    tags = torch.zeros(count, len(NAMES), dtype=torch.bool)
    for row, scene in zip(tags, scenes, strict=True):
        row[[*scene.labels, len(CLASSES) + scene.background]] = True
    prompts = [choice.choice(CAPTION_TEMPLATES).format(name) for name in NAMES]
    images = normalize(torch.from_numpy(np.stack([scene.image for scene in scenes])))
    return Batch(images, tags, prompts + [scene.caption for scene in scenes], separate)


def encode_text(model: CLIP, texts: list[str]) -> Tensor:
    """Return (N, E) unit features. Padding after the longest text is not computed: attention is causal."""
    tokens = tokenize(texts, model.config.context_length)
    length = int((tokens != 0).sum(1).max())
    x = model.token_embedding(tokens[:, :length]) + model.positional_embedding[:length]
    causal = torch.full((length, length), float("-inf")).triu(1)
    for block in model.transformer.resblocks:
        # need_weights selects plain matrix products, faster than fused attention at these sizes.
        x, _ = block(x, mask=causal, need_weights=True)
    ends = model.ln_final(x)[torch.arange(len(x)), tokens.argmax(-1)]
    return F.normalize((ends @ model.text_projection).float(), dim=-1)


def encode_images(model: CLIP, images: Tensor, separate: bool) -> tuple[Tensor, Tensor]:
    """Return unit token features (B, 1 + n, E) and the sum of attention between patches (B, n, n)."""
    visual = model.visual
    tokens, _ = visual.embed(images, position_rounding="never")
    mask = None
    if separate:
        mask = torch.zeros(tokens.shape[1], tokens.shape[1])
        mask[0, 1:] = mask[1:, 0] = float("-inf")
    last = visual.layers - 1
    attention = 0
    for index in range(visual.layers):
        tokens, weights = visual.block(index, tokens, mask if index < last else None, need_weights=True)
        if index > last - AFFINITY_LAYERS:
            attention = attention + weights[:, 1:, 1:]
    return F.normalize(visual.project(tokens).float(), dim=-1), attention


def contrast(logits: Tensor, matches: Tensor) -> Tensor:
    """Return the contrastive loss of the matches, averaged over rows and columns.

    Each match competes with the non-matches of its row (or column), not with other matches.

    Args:
        logits, matches: (R, C); `matches` bool.
    """

    def rows(logits: Tensor, matches: Tensor) -> Tensor:
        negatives = logits.masked_fill(matches, -1e4).logsumexp(1, keepdim=True)
        losses = F.softplus(negatives - logits) * matches
        count = matches.sum(1)
        return (losses.sum(1) / count.clamp(min=1)).sum() / (count > 0).sum().clamp(min=1)

    return (rows(logits, matches) + rows(logits.T, matches.T)) / 2


def grouping(attention: Tensor, logits: Tensor, tags: Tensor, images: Tensor) -> Tensor:
    """Return the KL divergence of attention from the target "same name and similar color".

    Names alone would reinforce errors: patches that attention mixes get the same name, and the target would
    connect them. Color prevents this.

    Args:
        attention: (B, n, n) non-negative.
        logits: (B, n, N) of patches against names; no gradient flows into them.
        tags: (B, N) bool, names of the caption; a patch has one of them.
        images: (B, 3, S, S), normalized.
    """
    names = logits.detach().masked_fill(~tags[:, None], -1e4).softmax(-1)  # (B, n, N)
    colors = F.avg_pool2d(images, CONFIG.patch_size).flatten(2).mT  # (B, n, 3)
    similarity = torch.exp(-torch.cdist(colors, colors) ** 2 / (2 * COLOR_DISTANCE**2))
    same = (names @ names.mT) ** 2 * similarity
    size = same.sum(-1, keepdim=True)  # (B, n, 1), number of patches with the same name
    target = same / size
    attention = attention / attention.sum(-1, keepdim=True)
    divergence = (target * ((target + 1e-8).log() - (attention + 1e-8).log())).sum(-1)  # (B, n)
    weights = 1 / size[..., 0]  # a small object has the same weight as the background
    return ((divergence * weights).sum(-1) / weights.sum(-1)).mean()


def losses(model: CLIP, batch: Batch, recipe: Recipe) -> tuple[Tensor, dict[str, float]]:
    """Return the weighted sum of the four terms, and the values to log."""
    with torch.autocast("cpu", torch.bfloat16):
        text = encode_text(model, batch.texts)  # (N + B, E)
        tokens, attention = encode_images(model, batch.images, batch.separate)
    scale = model.logit_scale.exp()
    names = len(NAMES)
    contents = torch.cat([torch.eye(names, dtype=torch.bool), batch.tags])  # (N + B, N), names in each text
    # A text matches an image that has all its names.
    matches = ~(contents[None] & ~batch.tags[:, None]).any(-1)  # (B, N + B)
    logits = scale * tokens[:, 0] @ text.T  # (B, N + B)
    patch_logits = scale * tokens[:, 1:] @ text[:names].T  # (B, n, N)
    image_logits = patch_logits.logsumexp(1) - math.log(patch_logits.shape[1])
    mean_feature = F.normalize(tokens[:, 1:].mean(1), dim=-1)
    terms = {
        "caption": contrast(logits, matches),
        "patch": contrast(image_logits, batch.tags),
        "mean": contrast(scale * mean_feature @ text.T, matches),
        "attention": grouping(attention, patch_logits, batch.tags, batch.images),
    }
    loss = (
        terms["caption"]
        + recipe.patch_weight * terms["patch"]
        + recipe.mean_weight * terms["mean"]
        + recipe.attention_weight * terms["attention"]
    )
    best = logits[:, :names].argmax(1, keepdim=True)
    recall = batch.tags.gather(1, best).float().mean()
    return loss, {"loss": loss.item(), **{k: v.item() for k, v in terms.items()}, "recall": recall.item()}


@torch.no_grad()
def probe(model: CLIP, seed: int, count: int = 24, size: tuple[int, int] = (96, 128)) -> float:
    """Return the mIoU of labeling every patch with its most similar name, on images of the val stream.

    Pixel labels are used only here: neither training nor model selection uses them.
    """
    text = encode_prompts(model, NAMES, CAPTION_TEMPLATES)
    channels = len(CLASSES) + 1
    hist = np.zeros((channels, channels), np.int64)
    grid = (size[0] // CONFIG.patch_size, size[1] // CONFIG.patch_size)
    for index in range(count):
        scene = draw(seed, index, size, "val")
        tokens, _ = encode_images(model, normalize(torch.from_numpy(scene.image))[None], separate=False)
        similarities = (tokens[0, 1:] @ text.T).T.reshape(1, len(NAMES), *grid)
        names = F.interpolate(similarities, size, mode="bilinear")[0].argmax(0).numpy()
        hist += confusion(scene.mask, np.where(names < len(CLASSES), names + 1, 0), channels)
    return scores(hist)["Mean IoU"]


def build_optimizer(model: CLIP, recipe: Recipe) -> torch.optim.Optimizer:
    """Return AdamW with weight decay for matrices, except embeddings, because most words never occur."""
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        (decayed if parameter.ndim > 1 and "embedding" not in name else free).append(parameter)
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": free, "weight_decay": 0}]
    return torch.optim.AdamW(groups, recipe.learning_rate, betas=(0.9, 0.98))


def learning_rate(recipe: Recipe, step: int) -> float:
    """Return the learning rate: linear warm-up, times half a cosine down to `final_rate`."""
    rise = min(1, (step + 1) / recipe.warm_up)
    fall = 0.5 + 0.5 * math.cos(math.pi * step / recipe.steps)
    return recipe.final_rate + (recipe.learning_rate - recipe.final_rate) * rise * fall


def train(recipe: Recipe, out: Path, log_every: int = 50, probe_every: int = 500) -> CLIP:
    """Train, or resume training; return the model.

    Writes the checkpoint `out`, a log with suffix .csv and, during training, a file with suffix .resume.

    Raises:
        ValueError: the resume file is damaged or belongs to another recipe.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    resume, log = out.with_suffix(".resume"), out.with_suffix(".csv")
    model = build(recipe.seed)
    optimizer = build_optimizer(model, recipe)
    start, rows, spent = 0, [], 0.0
    if resume.exists():
        state = _read_resume(resume, recipe)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start, rows, spent = state["step"], state["rows"], state["seconds"]
    began = time.monotonic() - spent
    for step in range(start, recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        loss, row = losses(model, draw_batch(recipe, step), recipe)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=MAX_SCALE)
        done = step + 1
        if done % log_every == 0 or done == recipe.steps:
            probed = done % probe_every == 0 or done == recipe.steps
            row |= {"step": done, "seconds": time.monotonic() - began}
            row["probe"] = probe(model, recipe.seed) if probed else ""
            rows.append({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
            logs.log.info("  ".join(f"{field} {rows[-1][field]}" for field in LOG_FIELDS))
            with open(log, "w", newline="") as stream:
                writer = csv.DictWriter(stream, LOG_FIELDS)
                writer.writeheader()
                writer.writerows(rows)
            if probed:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": done}
                state |= {"rows": rows, "recipe": asdict(recipe), "seconds": row["seconds"]}
                write_tensors(state, resume)
    write_tensors({key: value.half() for key, value in model.state_dict().items()}, out)
    resume.unlink(missing_ok=True)
    return model


def _read_resume(file: Path, recipe: Recipe) -> dict:
    try:
        state = read_tensors(file)
        same = state["recipe"] == asdict(recipe)
    except Exception as error:  # the file is damaged, or has other content
        reason = type(error).__name__  # the message has several lines
        raise ValueError(f"resume file {file} cannot be read ({reason}): delete it to restart") from None
    if not same:
        raise ValueError(f"resume file {file} belongs to another recipe: delete it to restart")
    return state


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="checkpoint to write, such as clip_shapes.pt")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    add_flags(parser, Recipe)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    try:
        train(from_args(Recipe(), args), args.out)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
