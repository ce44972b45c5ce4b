"""A plain CLIP-ES that works like the reference implementation, for benchmarks only.

Step 1 computes one image and one label at a time. Every block returns its attention. For each label, the last
block runs forward and backward again, including weight gradients; the affinity and its n x n product are
computed again; the initial and the refined map are resized to the image. The file contains the full-size
maps. The values are those of `pipeline.cams`. Step 2a reads all files into memory, for each background score
and once more for the best. Step 2b reads the full-size maps and runs pydensecrf.
"""
import io
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import clip
from clip.model import CLIP, Block
from pytorch_grad_cam.affinity import box_mask
from pytorch_grad_cam.methods import activation_map, min_max_normalize
from refinement.densecrf import densecrf

CONFIDENCE, IGNORE = 0.95, 255


def reference_cams(
    model: CLIP, image: Image.Image, text: Tensor, backgrounds: Tensor, threshold: float
) -> np.ndarray:
    """Return the refined CAMs of one image at image size.

    Args:
        text: (K, E) features of the labels.
        backgrounds: (M, E).
        threshold: lambda of the box masks.

    Returns:
        (K, H, W) float16.
    """
    visual = model.visual
    patch = visual.patch_size
    size = clip.target_size(image.height, image.width, patch)
    rows, columns = size[0] // patch, size[1] // patch
    maps = []
    with torch.no_grad():
        pixels = clip.preprocess(image, size, model.config.mean, model.config.std)[None]
        tokens, _ = visual.embed(pixels.to(model.device))
        for block in visual.transformer.resblocks[:-1]:
            tokens, attention = _block(block, tokens, block.ln_1(tokens))
            maps.append(attention)
    last = visual.transformer.resblocks[-1]
    trained = [*last.parameters(), *visual.ln_post.parameters(), visual.proj]
    for parameter in trained:
        parameter.requires_grad_(True)
    candidates = torch.cat([text, backgrounds])
    results = []
    for label in range(len(text)):
        ln1_output = last.ln_1(tokens)
        ln1_output.retain_grad()
        output, attention = _block(last, tokens, ln1_output)
        feature = visual.ln_post(output[0, 1:]).mean(0) @ visual.proj
        feature = feature / feature.norm()
        probabilities = (model.logit_scale.exp() * candidates @ feature).softmax(-1)
        probabilities[label].backward()
        weights = ln1_output.grad[0, 1:].mean(0)  # (C,)
        raw = (ln1_output.detach()[0, 1:] @ weights).reshape(rows, columns)
        cam = activation_map(raw)
        on_cpu = cam.cpu().numpy()
        cv2.resize(on_cpu, (image.width, image.height))  # the full-size initial map, computed and not used
        matrix = torch.stack([*maps, attention.detach()][-8:])[:, 0, 1:, 1:].mean(0)
        for _ in range(3):
            matrix = matrix / matrix.sum(0, keepdim=True)
            matrix = matrix / matrix.sum(1, keepdim=True)
        matrix = (matrix + matrix.T) / 2
        matrix = matrix @ matrix
        mask = torch.from_numpy(box_mask(on_cpu, threshold)).flatten().to(matrix.device)
        refined = (matrix * mask) @ cam.flatten()
        refined = min_max_normalize(refined.reshape(rows, columns)).cpu().numpy()
        results.append(cv2.resize(refined, (image.width, image.height)))
    for parameter in trained:
        parameter.requires_grad_(False).grad = None
    return np.stack(results).astype(np.float16)


def write_cams(file: Path, keys: Sequence[int], maps: np.ndarray) -> None:
    """Save (K, H, W) float16 maps in the published file format."""
    np.save(file, {"keys": np.array(keys), "attn_highres": maps})


def read_cams(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return (K,) class indices and (K, H, W) float16 maps of a file written by `write_cams`."""
    content = np.load(file, allow_pickle=True).item()
    return content["keys"], content["attn_highres"]


def reference_mask(image_file: Path, cam_file: Path) -> np.ndarray:
    """Return the pseudo mask of one image by pydensecrf: (H, W) uint8, 255 for ignored pixels."""
    image = np.asarray(Image.open(image_file).convert("RGB"))
    keys, maps = read_cams(cam_file)
    probabilities = np.concatenate([1 - maps.max(0, keepdims=True), maps])  # (K + 1, H, W)
    posterior = densecrf(image, probabilities, "clip_es", backend="pydensecrf")
    labels = np.append(0, keys + 1)[posterior.argmax(0)].astype(np.uint8)
    labels[posterior.max(0) < CONFIDENCE] = IGNORE
    return labels


def reference_evaluation(
    names: Sequence[str], cam_dir: Path, truth_dir: Path, exponents: Sequence[float], channels: int
) -> list[np.ndarray]:
    """Return the (n, n) confusion matrices of step 2a: for each exponent, and for the best again."""
    hists = [_evaluate(names, cam_dir, truth_dir, exponent, channels) for exponent in exponents]
    best = max(range(len(hists)), key=lambda index: _mean_iou(hists[index]))
    return [*hists, _evaluate(names, cam_dir, truth_dir, exponents[best], channels)]


def _evaluate(
    names: Sequence[str], cam_dir: Path, truth_dir: Path, exponent: float, channels: int
) -> np.ndarray:
    predictions, truths = [], []
    for name in names:
        keys, maps = read_cams(cam_dir / f"{name}.npy")
        rest = np.power(1 - maps.max(0, keepdims=True), np.float16(exponent))  # all in float16
        labels = np.concatenate([rest, maps]).argmax(0)
        predictions.append(np.append(0, keys + 1)[labels].astype(np.uint8))
        truths.append(np.array(Image.open(io.BytesIO((truth_dir / f"{name}.png").read_bytes()))))
    hist = np.zeros((channels, channels))
    for truth, prediction in zip(truths, predictions, strict=True):
        known = truth.ravel() < channels
        pairs = channels * truth.ravel()[known].astype(int) + prediction.ravel()[known]
        hist += np.bincount(pairs, minlength=channels**2).reshape(channels, channels)
    return hist


def _mean_iou(hist: np.ndarray) -> float:
    hit, true = np.diag(hist), hist.sum(1)
    return float(np.mean(hit[true > 0] / (true + hist.sum(0) - hit)[true > 0]))


def _block(block: Block, tokens: Tensor, ln1_output: Tensor) -> tuple[Tensor, Tensor]:
    """Return tokens (B, L, C) and attention (B, L, L) of a block, computed by torch's attention."""
    attn, sequence = block.attn, ln1_output.transpose(0, 1)  # (L, B, C)
    mixed, attention = F.multi_head_attention_forward(
        sequence,
        sequence,
        sequence,
        embed_dim_to_check=tokens.shape[-1],
        num_heads=attn.heads,
        in_proj_weight=attn.in_proj_weight,
        in_proj_bias=attn.in_proj_bias,
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0.0,
        out_proj_weight=attn.out_proj.weight,
        out_proj_bias=attn.out_proj.bias,
        training=False,
    )
    tokens = tokens + mixed.transpose(0, 1)
    return tokens + block.mlp(block.ln_2(tokens)), attention
