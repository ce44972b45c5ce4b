"""Train the small CLIP of the drawn world from scratch: `python -m shapes.train_clip --out FILE`.

Contrastive, on images and captions drawn on the fly; no pixel labels. The result is a float16 state
dict in the layout of OpenAI's checkpoints. Two CPU cores take about an hour; a killed run continues
where its last resume file was written, and gives the same weights.

Four terms make the loss. Besides CLIP's own they shape *where* the evidence for a caption sits, since in
so small a network it would otherwise reach the class token in early blocks, and a CAM of the last
block would say little:

1. class token against captions and names, as CLIP is trained. In a random part of the steps the class
   token is kept apart from the patches in all blocks but the last, so that what it knows of the image
   comes through the last block's attention.
2. patches against names: the log-sum-exp over patches of patch-to-name similarities says whether
   a name is somewhere in the image.
3. mean patch feature against captions and names, the score that CLIP-ES differentiates.
4. attention between patches (mean over heads and the last 8 blocks) should join patches of like colour
   that the model itself gives the same name among those of the caption. Attention of a large CLIP
   does so by itself; that of a small one is diffuse, and would blur a CAM instead of refining it.
"""
import argparse
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

from clip.model import CLIP, Config
from clip.prompts import encode_prompts
from clip.tokenizer import tokenize
from common.files import replacing
from shapes.world import BACKGROUNDS, CAPTION_TEMPLATES, CLASSES, draw

CONFIG = Config(
    embed_dim=64,
    image_resolution=96,
    vision_layers=10,  # two more than the affinity averages: the first see nothing but local colour
    vision_width=128,
    patch_size=8,
    context_length=77,
    vocab_size=49408,
    text_width=64,
    text_layers=2,
)
NAMES = [kind.name for kind in (*CLASSES, *BACKGROUNDS)]
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)  # of CLIP's preprocessing
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
MAX_SCALE = math.log(100)  # of the logits, as in CLIP
LIKENESS = 0.5  # how far the mean colours of like patches lie apart, in normalised units
AVERAGED_BLOCKS = 8  # whose attention CLIP-ES averages
LOG_FIELDS = ("step", "loss", "caption", "patch", "mean", "attention", "recall", "probe", "seconds")


@dataclass(frozen=True)
class Recipe:
    """What a run depends on."""

    steps: int = 450
    batch: int = 96
    seed: int = 0
    learning_rate: float = 1e-3
    final_rate: float = 1e-5
    warm_up: int = 100
    weight_decay: float = 0.05
    side: int = 64
    big_side: int = 96  # a larger grid in some steps, so that larger images work
    big_share: float = 0.25  # of the steps; they have half the batch
    apart_share: float = 0.7  # of the steps in which the class token is kept apart
    patch_weight: float = 0.5
    mean_weight: float = 0.25
    attention_weight: float = 1.0


def build(seed: int) -> CLIP:
    """A new CLIP. Queries start equal to keys, so that attention starts as likeness of tokens."""
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
        # Textures are weak beside the contrast of colours: let the first filters see them twice as well.
        filters = model.visual.conv1.weight
        filters += filters - filters.mean((2, 3), keepdim=True)
    return model


@dataclass
class Batch:
    """`images` (B, 3, S, S), normalised; `tags` (B, N) bool, the names that each image's caption
    holds; `texts` are prompts of the N names, then the B captions."""

    images: Tensor
    tags: Tensor
    texts: list[str]
    apart: bool


def draw_batch(recipe: Recipe, step: int) -> Batch:
    """The images and captions of one step, the same however training got there."""
    choice = random.Random(f"{recipe.seed} {step}")
    big = choice.random() < recipe.big_share
    apart = choice.random() < recipe.apart_share
    side = recipe.big_side if big else recipe.side
    count = recipe.batch // 2 if big else recipe.batch
    first = step * recipe.batch
    scenes = [draw(recipe.seed, first + i, (side, side), "clip") for i in range(count)]
    tags = torch.zeros(count, len(NAMES), dtype=torch.bool)
    for row, scene in zip(tags, scenes, strict=True):
        row[[*scene.labels, len(CLASSES) + scene.background]] = True
    prompts = [choice.choice(CAPTION_TEMPLATES).format(name) for name in NAMES]
    images = torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2)
    images = (images / 255 - MEAN) / STD
    return Batch(images, tags, prompts + [scene.caption for scene in scenes], apart)


def encode_text(model: CLIP, texts: list[str]) -> Tensor:
    """(N, E) unit features. Attention is causal, so the padding after the longest text is left out."""
    tokens = tokenize(texts, model.config.context_length)
    length = int((tokens != 0).sum(1).max())
    x = model.token_embedding(tokens[:, :length]) + model.positional_embedding[:length]
    causal = torch.full((length, length), float("-inf")).triu(1)
    for block in model.transformer.resblocks:
        # With weights a block mixes in plain products, faster than fused attention at these sizes.
        x, _ = block(x, mask=causal, need_weights=True)
    ends = model.ln_final(x)[torch.arange(len(x)), tokens.argmax(-1)]
    return F.normalize((ends @ model.text_projection).float(), dim=-1)


def encode_images(model: CLIP, images: Tensor, apart: bool) -> tuple[Tensor, Tensor]:
    """Unit token features (B, 1 + n, E), and attention between patches (B, n, n)."""
    visual = model.visual
    tokens, _ = visual.embed(images, position_rounding="never")
    mask = None
    if apart:
        mask = torch.zeros(tokens.shape[1], tokens.shape[1])
        mask[0, 1:] = mask[1:, 0] = float("-inf")
    last = visual.layers - 1
    attention = 0
    for index in range(visual.layers):
        tokens, weights = visual.block(index, tokens, mask if index < last else None, need_weights=True)
        if index > last - AVERAGED_BLOCKS:
            attention = attention + weights[:, 1:, 1:]
    return F.normalize(visual.project(tokens).float(), dim=-1), attention


def contrast(logits: Tensor, matches: Tensor) -> Tensor:
    """Each match against the row's non-matches (its other matches left out), rows and columns alike.

    Args:
        logits, matches: (R, C); `matches` bool.
    """

    def rows(logits: Tensor, matches: Tensor) -> Tensor:
        rivals = logits.masked_fill(matches, -1e4).logsumexp(1, keepdim=True)
        losses = F.softplus(rivals - logits) * matches
        count = matches.sum(1)
        return (losses.sum(1) / count.clamp(min=1)).sum() / (count > 0).sum().clamp(min=1)

    return (rows(logits, matches) + rows(logits.T, matches.T)) / 2


def grouping(attention: Tensor, logits: Tensor, tags: Tensor, images: Tensor) -> Tensor:
    """Divergence of attention from the relation "these patches bear the same name and look alike".

    Names alone would feed on themselves: what attention mixes is named alike, and then grouped.

    Args:
        attention: (B, n, n) non-negative.
        logits: (B, n, N) of patches against names; no gradient flows into them.
        tags: (B, N) bool, names of the caption; no other can be a patch's.
        images: (B, 3, S, S), normalised.
    """
    names = logits.detach().masked_fill(~tags[:, None], -1e4).softmax(-1)  # (B, n, N)
    colours = F.avg_pool2d(images, CONFIG.patch_size).flatten(2).mT  # (B, n, 3)
    alike = torch.exp(-torch.cdist(colours, colours) ** 2 / (2 * LIKENESS**2))
    same = (names @ names.mT) ** 2 * alike
    size = same.sum(-1, keepdim=True)  # (B, n, 1), patches of the same name
    target = same / size
    attention = attention / attention.sum(-1, keepdim=True)
    divergence = (target * ((target + 1e-8).log() - (attention + 1e-8).log())).sum(-1)  # (B, n)
    weights = 1 / size[..., 0]  # a small object counts as much as the background
    return ((divergence * weights).sum(-1) / weights.sum(-1)).mean()


def losses(model: CLIP, batch: Batch, recipe: Recipe) -> tuple[Tensor, dict[str, float]]:
    """The weighted sum of the four terms, and what to log of them."""
    with torch.autocast("cpu", torch.bfloat16):
        text = encode_text(model, batch.texts)  # (N + B, E)
        tokens, attention = encode_images(model, batch.images, batch.apart)
    scale = model.logit_scale.exp()
    names = len(NAMES)
    contents = torch.cat([torch.eye(names, dtype=torch.bool), batch.tags])  # (N + B, N), of the texts
    # A text matches an image that holds all it names.
    matches = ~(contents[None] & ~batch.tags[:, None]).any(-1)  # (B, N + B)
    scores = scale * tokens[:, 0] @ text.T  # (B, N + B)
    patch_scores = scale * tokens[:, 1:] @ text[:names].T  # (B, n, N)
    somewhere = patch_scores.logsumexp(1) - math.log(patch_scores.shape[1])
    mean_feature = F.normalize(tokens[:, 1:].mean(1), dim=-1)
    terms = {
        "caption": contrast(scores, matches),
        "patch": contrast(somewhere, batch.tags),
        "mean": contrast(scale * mean_feature @ text.T, matches),
        "attention": grouping(attention, patch_scores, batch.tags, batch.images),
    }
    loss = (
        terms["caption"]
        + recipe.patch_weight * terms["patch"]
        + recipe.mean_weight * terms["mean"]
        + recipe.attention_weight * terms["attention"]
    )
    best = scores[:, :names].argmax(1, keepdim=True)
    recall = batch.tags.gather(1, best).float().mean()
    return loss, {"loss": loss.item(), **{k: v.item() for k, v in terms.items()}, "recall": recall.item()}


@torch.no_grad()
def probe(model: CLIP, seed: int, count: int = 24, size: tuple[int, int] = (96, 128)) -> float:
    """mIoU of naming every patch by its most similar name, on images of the val stream.

    Only this measurement sees pixel labels; nothing is trained or chosen by it.
    """
    text = encode_prompts(model, NAMES, CAPTION_TEMPLATES)
    channels = len(CLASSES) + 1
    confusion = np.zeros(channels * channels, np.int64)
    grid = (size[0] // CONFIG.patch_size, size[1] // CONFIG.patch_size)
    for index in range(count):
        scene = draw(seed, index, size, "val")
        image = (torch.from_numpy(scene.image).permute(2, 0, 1) / 255 - MEAN) / STD
        tokens, _ = encode_images(model, image[None], apart=False)
        scores = (tokens[0, 1:] @ text.T).T.reshape(1, len(NAMES), *grid)
        names = F.interpolate(scores, size, mode="bilinear")[0].argmax(0).numpy()
        predicted = np.where(names < len(CLASSES), names + 1, 0)
        confusion += np.bincount((scene.mask * channels + predicted).ravel(), minlength=len(confusion))
    hits = confusion.reshape(channels, channels)
    union = hits.sum(0) + hits.sum(1) - hits.diagonal()
    present = hits.sum(1) > 0
    return float((hits.diagonal()[present] / union[present]).mean())


def optimizer(model: CLIP, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW; weight decay for matrices only, not for the embeddings of unused words."""
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        (decayed if parameter.ndim > 1 and "embedding" not in name else free).append(parameter)
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": free, "weight_decay": 0}]
    return torch.optim.AdamW(groups, recipe.learning_rate, betas=(0.9, 0.98))


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then half a cosine down to `final_rate`."""
    rise = min(1, (step + 1) / recipe.warm_up)
    fall = 0.5 + 0.5 * math.cos(math.pi * step / recipe.steps)
    return recipe.final_rate + (recipe.learning_rate - recipe.final_rate) * rise * fall


def train(recipe: Recipe, out: Path, log_every: int = 50, probe_every: int = 500) -> CLIP:
    """Train, or go on training; write `out`, its log `out`.csv and, on the way, `out`.resume.

    Raises:
        ValueError: the resume file is damaged, or of another recipe.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    resume, log = out.with_suffix(".resume"), out.with_suffix(".csv")
    model = build(recipe.seed)
    optimiser = optimizer(model, recipe)
    start, rows, spent = 0, [], 0.0
    if resume.exists():
        state = _read_resume(resume, recipe)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimizer"])
        start, rows, spent = state["step"], state["rows"], state["seconds"]
    began = time.monotonic() - spent
    for step in range(start, recipe.steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(recipe, step)
        loss, row = losses(model, draw_batch(recipe, step), recipe)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=MAX_SCALE)
        done = step + 1
        if done % log_every == 0 or done == recipe.steps:
            probed = done % probe_every == 0 or done == recipe.steps
            row |= {"step": done, "seconds": time.monotonic() - began}
            row["probe"] = probe(model, recipe.seed) if probed else ""
            rows.append({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
            print("  ".join(f"{field} {rows[-1][field]}" for field in LOG_FIELDS), flush=True)
            _write_log(log, rows)
            if probed:
                state = {"model": model.state_dict(), "optimizer": optimiser.state_dict(), "step": done}
                state |= {"rows": rows, "recipe": asdict(recipe), "seconds": row["seconds"]}
                _save(state, resume)
    _save({key: value.half() for key, value in model.state_dict().items()}, out)
    resume.unlink(missing_ok=True)
    return model


def _read_resume(file: Path, recipe: Recipe) -> dict:
    try:
        state = torch.load(file, weights_only=True)
        same = state["recipe"] == asdict(recipe)
    except Exception as error:  # torch.load raises whatever the damaged bytes lead it to
        raise ValueError(f"resume file {file} cannot be read ({error}): remove it to begin anew") from None
    if not same:
        raise ValueError(f"resume file {file} is of another recipe: remove it to begin anew")
    return state


def _save(state: dict, file: Path) -> None:
    with replacing(file) as stream:
        torch.save(state, stream)


def _write_log(file: Path, rows: list[dict]) -> None:
    with open(file, "w", newline="") as stream:
        writer = csv.DictWriter(stream, LOG_FIELDS)
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    defaults = Recipe()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="checkpoint to write, such as clip_shapes.pt")
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--batch", type=int, default=defaults.batch)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    try:
        train(Recipe(steps=args.steps, batch=args.batch, seed=args.seed), args.out)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
