"""CAMs the way the public CLIP-ES makes them, one label at a time: for measuring only.

Every block returns its attention; for each label the last block runs forward and backward again,
weight gradients included, the affinity is made anew with its n x n product, and both the initial and
the refined map are brought to image size. The numbers are those of `pipeline.cams.image_cams`.
"""
import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

import clip
from clip.model import CLIP
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
        for index in range(visual.layers - 1):
            tokens, attention = visual.block(index, tokens, maps=True)
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
        output, attention = visual.block(-1, tokens, maps=True, normed=normed)
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
