"""CAMs the way the public CLIP-ES makes them, one label at a time: for measuring only.

Every block returns its attention; for each label the last block runs forward and backward again,
weight gradients included, the affinity is made anew with its n x n product, and both the initial and
the refined map are brought to image size. The numbers are those of `pipeline.cams.image_cams`.
"""
import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import clip
from clip.model import CLIP, Block
from pytorch_grad_cam.affinity import box_mask
from pytorch_grad_cam.methods import activation_map, scale


def reference_cams(
    model: CLIP, image: Image.Image, text: Tensor, backgrounds: Tensor, threshold: float
) -> np.ndarray:
    """Refined CAMs of one image at image size.

    Args:
        text: (K, E) features of its labels; backgrounds: (M, E).
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
        tokens, _ = visual.embed(clip.preprocess(image, size, model.config.mean, model.config.std)[None])
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
        normed = last.ln_1(tokens)
        normed.retain_grad()
        output, attention = _block(last, tokens, normed)
        feature = visual.ln_post(output[0, 1:]).mean(0) @ visual.proj
        feature = feature / feature.norm()
        probabilities = (model.logit_scale.exp() * candidates @ feature).softmax(-1)
        probabilities[label].backward()
        weights = normed.grad[0, 1:].mean(0)  # (C,)
        raw = (normed.detach()[0, 1:] @ weights).reshape(rows, columns)
        cam = activation_map(raw).numpy()
        cv2.resize(cam, (image.width, image.height))  # made for each label, and thrown away
        matrix = torch.stack([*maps, attention.detach()][-8:])[:, 0, 1:, 1:].mean(0)
        for _ in range(3):
            matrix = matrix / matrix.sum(0, keepdim=True)
            matrix = matrix / matrix.sum(1, keepdim=True)
        matrix = (matrix + matrix.T) / 2
        matrix = matrix @ matrix
        mask = torch.from_numpy(box_mask(cam, threshold)).flatten()
        refined = (matrix * mask) @ torch.from_numpy(cam).flatten()
        refined = scale(refined.reshape(rows, columns)).numpy()
        results.append(cv2.resize(refined, (image.width, image.height)))
    for parameter in trained:
        parameter.requires_grad_(False).grad = None
    return np.stack(results).astype(np.float16)


def _block(block: Block, tokens: Tensor, normed: Tensor) -> tuple[Tensor, Tensor]:
    """One block by torch's own attention, all heads at once and with their map: (B, L, C), (B, L, L)."""
    attn, sequence = block.attn, normed.transpose(0, 1)  # (L, B, C)
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
