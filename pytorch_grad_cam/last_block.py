"""The last transformer block of a ViT and its vector-Jacobian product in closed form.

For each label, Grad-CAM on a ViT needs only the *mean over patches* of the gradient of the label's score with
respect to the block's ln_1 output a. The score depends on the mean patch feature f. There are L tokens, of
which n are patches; d = 64; x^ = (x - mean(x)) / sigma(x) over channels. `forward` computes:

    q, k, v = a W_in^T + b_in                         per head, (L, d)
    A = softmax(q k^T / sqrt(d))                      per head, (L, L)
    o = A v                                           per head; from here on patches only
    y = x + o W_out^T + b_out                         (n, C)
    u = (g_2 y^ + b_2) W_fc^T + b_fc                  (n, 4C); g_2, b_2: weight and bias of ln_2
    z = y + phi(u) W_proj^T + b_proj                  (n, C)
    f = mean_i(g z^_i + b) P                          (E); g, b: weight and bias of ln_post; P: proj

`vjp` computes, for a direction e in the space of f, the mean over patches of d(e . f) / da. The gradient
d(e . f) / dx is written dx. All gradients are multiplied by n until the end:

    c  = g (e P^T)                                    the same for all patches, (C)
    s  = c . z^ / C                                   per patch
    dz = (c - mean(c) - s z^) / sigma(z)
    du = ((c - mean(c)) W_proj - s z^ W_proj) phi'(u) / sigma(z)
    dy^ = g_2 (du W_fc)
    dy = dz + (dy^ - mean(dy^) - y^ mean(dy^ y^)) / sigma(y)
    do = dy W_out                                     per head
    r  = do . o                                       per patch and head
    dS = A (do v^T - r)                               d(e . f) / d(q k^T / sqrt(d))

Only the sums over patches of dq, dk and dv are needed. Each row of dS sums to 0, so its sum over patches is
minus its entry in the column of the class token (index 0):

    sum dq = sum_j (v_j . (A^T do)_j - (A^T r)_j) k_j / sqrt(d)
    sum dk = -sum_i A_i0 (do_i . v_0 - r_i) q_i / sqrt(d)
    sum dv = sum_i (1 - A_i0) do_i
    result = [sum dq, sum dk, sum dv] W_in / n^2      1 / n for the mean in f, 1 / n for the mean of da

Each label costs one product with W_fc, one with W_out and one with A: 5.4 GFLOP for ViT-B/16 at 375 x 500.
Automatic differentiation costs 17 GFLOP. z^ W_proj phi'(u) / sigma(z) is the same for all labels and computed
once.
"""
import math
from typing import NamedTuple

import torch
from torch import Tensor

from clip.model import HEAD_WIDTH, LayerNorm, QuickGELU, VisionTransformer, attend_with_weights

LABELS_AT_ONCE = 4  # limits memory: each label needs several arrays of (n, 4C)


class LastBlock(NamedTuple):
    """Result of `forward`, with the symbols of the equations above; y, z and u only at the patches."""

    visual: VisionTransformer  # `vjp` uses its weights
    ln1_output: Tensor  # (B, n, C) float32, a at the patches: the activations of Grad-CAM
    attention: Tensor  # (B, L, L) float32, mean of A over heads
    feature: Tensor  # (B, E) float32, f
    q: Tensor  # (B, heads, n, d), at the patches
    k: Tensor  # (B, heads, L, d)
    v: Tensor  # (B, heads, L, d)
    A: Tensor  # (heads, B, n, L)
    o: Tensor  # (B, heads, n, d)
    y_hat: Tensor  # (B, n, C) float32
    y_rstd: Tensor  # (B, n, 1) float32, 1 / sigma(y)
    z_hat: Tensor  # (B, n, C) float32
    z_rstd: Tensor  # (B, n, 1) float32, 1 / sigma(z)
    dphi: Tensor  # (B, n, 4C), phi'(u) / sigma(z)
    z_proj: Tensor  # (B, n, 4C), z^ W_proj phi'(u) / sigma(z)


@torch.no_grad()
def forward(visual: VisionTransformer, tokens: Tensor) -> LastBlock:
    """Run the last block of a tower on `tokens` (B, 1 + n, C); return the values that `vjp` needs."""
    block = visual.transformer.resblocks[-1]
    a = block.ln_1(tokens)  # (B, L, C)
    q, k, v = block.attn.qkv(a)
    o, attention, A = attend_with_weights(q, k, v, keep_heads=True)
    q, o, A = q[:, :, 1:], o[:, :, 1:], A[:, :, 1:]
    y = tokens[:, 1:] + block.attn.out_proj(o.transpose(1, 2).flatten(2))  # (B, n, C)
    y_hat, y_rstd = _normalize(block.ln_2, y)
    u = block.mlp.c_fc(_affine(block.ln_2, y_hat).to(y.dtype))  # (B, n, 4C)
    phi, dphi = _activate(block.mlp.gelu, u)
    z_hat, z_rstd = _normalize(visual.ln_post, block.mlp.c_proj(phi).add_(y))
    dphi = dphi * z_rstd.to(dphi.dtype)
    z_proj = (z_hat.to(dphi.dtype) @ block.mlp.c_proj.weight).mul_(dphi)
    feature = _affine(visual.ln_post, z_hat).mean(1) @ visual.proj.float()
    ln1_output = a[:, 1:].float()
    return LastBlock(
        visual, ln1_output, attention, feature, q, k, v, A, o, y_hat, y_rstd, z_hat, z_rstd, dphi, z_proj
    )


@torch.no_grad()
def vjp(saved: LastBlock, directions: Tensor) -> Tensor:
    """Return the mean gradients over patches (B, K, C) for directions e of K labels (B, K, E), float32."""
    return torch.cat([_vjp(saved, chunk) for chunk in directions.split(LABELS_AT_ONCE, 1)], 1)


def _vjp(saved: LastBlock, directions: Tensor) -> Tensor:
    visual, block = saved.visual, saved.visual.transformer.resblocks[-1]
    n, width = saved.z_hat.shape[1:]
    y_hat, z_hat, dtype = saved.y_hat[:, None], saved.z_hat[:, None], saved.dphi.dtype  # (B, 1, n, C)

    # ln_post
    c = (directions @ visual.proj.float().T) * visual.ln_post.weight  # (B, K, C)
    s = (c @ saved.z_hat.mT / width)[..., None]  # (B, K, n, 1)
    c = (c - c.mean(-1, keepdim=True))[:, :, None]  # (B, K, 1, C)
    dz = torch.addcmul(c, s, z_hat, value=-1).mul_(saved.z_rstd[:, None])  # (B, K, n, C)

    # MLP and ln_2
    du = (c.to(dtype) @ block.mlp.c_proj.weight) * saved.dphi[:, None]  # (B, K, n, 4C)
    du.addcmul_(s.to(dtype), saved.z_proj[:, None], value=-1)
    dy_hat = (du @ block.mlp.c_fc.weight).float().mul_(block.ln_2.weight)  # (B, K, n, C)
    mean_product = (dy_hat * y_hat).mean(-1, keepdim=True)
    dy_hat.sub_(dy_hat.mean(-1, keepdim=True)).addcmul_(y_hat, mean_product, value=-1)
    dy = dz.addcmul_(dy_hat, saved.y_rstd[:, None])

    # Attention, head by head
    do = (dy.to(dtype) @ block.attn.out_proj.weight).unflatten(-1, (-1, HEAD_WIDTH))  # (B, K, n, heads, d)
    do = do.permute(0, 3, 2, 1, 4)  # (B, heads, n, K, d)
    sums = [_attention_sums(saved, head, do[:, head]) for head in range(do.shape[1])]
    sums = torch.stack(sums, 3).flatten(3)  # (B, 3, K, heads, d) -> (B, 3, K, C)
    sums = sums.transpose(1, 2).flatten(2).float()  # (B, K, 3C)
    return sums @ block.attn.in_proj_weight.float() / n**2


def _attention_sums(saved: LastBlock, head: int, do: Tensor) -> Tensor:
    """Return the sums over patches of dq, dk and dv, (B, 3, K, d), of one head, given do (B, n, K, d)."""
    A, q, k, v, o = saved.A[head], saved.q[:, head], saved.k[:, head], saved.v[:, head], saved.o[:, head]
    labels = do.shape[2]
    r = (do * o[:, :, None]).sum(-1)  # (B, n, K)
    A_do, A_r = (A.mT @ torch.cat([do.flatten(2), r], -1)).split([labels * HEAD_WIDTH, labels], -1)
    dS_columns = (A_do.unflatten(-1, (labels, -1)) * v[:, :, None]).sum(-1) - A_r  # (B, L, K)
    A_class = A[..., :1]  # (B, n, 1), weight of the class token
    dS_class = A_class * ((do * v[:, :1, None]).sum(-1) - r)  # (B, n, K)
    dq = HEAD_WIDTH**-0.5 * (dS_columns.mT @ k)  # (B, K, d)
    dk = -(HEAD_WIDTH**-0.5) * (dS_class.mT @ q)
    dv = ((1 - A_class).mT @ do.flatten(2)).unflatten(-1, (labels, -1))[:, 0]
    return torch.stack([dq, dk, dv], 1)


def _normalize(layer: LayerNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x^ and 1 / sigma(x) in float32."""
    x = x.float()
    variance, mean = torch.var_mean(x, -1, keepdim=True, correction=0)
    rstd = (variance + layer.eps).rsqrt()
    return (x - mean) * rstd, rstd


def _affine(layer: LayerNorm, x_hat: Tensor) -> Tensor:
    return x_hat * layer.weight + layer.bias


def _activate(activation: torch.nn.Module, u: Tensor) -> tuple[Tensor, Tensor]:
    """Return phi(u) and phi'(u) of QuickGELU or GELU."""
    if isinstance(activation, QuickGELU):
        gate = (1.702 * u).sigmoid_()
        phi = u * gate
        return phi, torch.addcmul(gate, phi, 1 - gate, value=1.702)
    wide = u.float()
    density = torch.exp(-0.5 * wide * wide) / math.sqrt(2 * math.pi)
    return activation(u), (0.5 * (1 + torch.erf(wide / math.sqrt(2))) + wide * density).to(u.dtype)
