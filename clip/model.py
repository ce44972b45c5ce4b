"""CLIP as plain modules: attention blocks, the ViT image tower, the text tower.

Parameters have the names of OpenAI's checkpoints (Radford et al., ICML 2021). The image tower is run step by
step (`embed`, `block` or `blocks`, `project`), because methods built on a frozen CLIP need intermediate
values.
"""
import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip.positions import resample_positions
from clip.resnet import Bottleneck, ModifiedResNet, normal

HEAD_WIDTH = 64  # every published CLIP tower has width // 64 heads
# Smaller attention weights do not change a float32 sum. Products with denormal numbers are ten times slower.
NEGLIGIBLE = 1e-30
CHUNK_BYTES = 2**28  # memory of one chunk of heads on CUDA; about 2^25 scores and weights fully use any GPU

RGB = tuple[float, float, float]


@dataclass(frozen=True)
class Config:
    """Sizes of a CLIP, see `clip.checkpoint.infer_config`, and its conventions; the defaults are OpenAI's."""

    embed_dim: int
    image_resolution: int
    vision_layers: int | tuple[int, int, int, int]  # blocks of a ViT, or of the four stages of a ResNet
    vision_width: int
    patch_size: int | None  # None for a ResNet
    context_length: int
    vocab_size: int
    text_width: int
    text_layers: int
    activation: str = "quick_gelu"  # or "gelu"
    mean: RGB = (0.48145466, 0.4578275, 0.40821073)
    std: RGB = (0.26862954, 0.26130258, 0.27577711)


class LayerNorm(nn.LayerNorm):
    """Layer norm computed in float32, returned in the type of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the activation of OpenAI's CLIP."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1.702 * x).sigmoid_()


ACTIVATIONS = {"quick_gelu": QuickGELU, "gelu": nn.GELU}


def attend_with_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    keep_heads: bool = False,
    heads_at_once: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the output of attention and its weights.

    If no gradient is needed, heads are computed in chunks that reuse the same memory. In this case,
    weights that include the mask are set to 0 if they are below NEGLIGIBLE.

    Args:
        query, key, value: (B, heads, L, 64).
        mask: additive, broadcastable to (B, heads, L, L).
        keep_heads: also return the weights of each head.
        heads_at_once: heads per chunk; None uses `heads_per_chunk`.

    Returns:
        Output, (B, heads, L, 64).
        Weights *without* the mask, averaged over heads, (B, L, L) float32; rows are queries.
        Weights of each head with the mask, (heads, B, L, L) in the type of `value`; None if not `keep_heads`.
    """
    batch, heads, length, width = query.shape
    if mask is not None:
        mask = mask.expand(batch, heads, length, length)
    if torch.is_grad_enabled() and query.requires_grad:  # buffers saved by autograd must not be overwritten
        scores = (query * width**-0.5) @ key.mT  # (B, heads, L, L)
        attention = scores.softmax(-1, dtype=torch.float32)
        weights = attention if mask is None else (scores + mask).softmax(-1, dtype=torch.float32)
        weights = weights.to(value.dtype)
        return weights @ value, attention.mean(1), weights.transpose(0, 1) if keep_heads else None
    chunk = heads_at_once or heads_per_chunk(query)
    score_buffer = query.new_empty(chunk, batch, length, length)
    weight_buffer = torch.empty_like(score_buffer, dtype=torch.float32)
    attention = weight_buffer.new_zeros(batch, length, length)
    output = value.new_empty(heads, batch, length, width)
    head_weights = value.new_empty(heads, batch, length, length) if keep_heads else None
    for start in range(0, heads, chunk):
        q, k, v = (x[:, start : start + chunk].transpose(0, 1).flatten(0, 1) for x in (query, key, value))
        scores, weights = score_buffer[: len(q) // batch], weight_buffer[: len(q) // batch]
        torch.bmm(q * width**-0.5, k.mT, out=scores.flatten(0, 1))
        torch.softmax(scores, -1, dtype=torch.float32, out=weights)
        attention.add_(weights[0] if len(weights) == 1 else weights.sum(0))
        if mask is not None:
            scores.add_(mask[:, start : start + chunk].transpose(0, 1))
            torch.softmax(scores, -1, dtype=torch.float32, out=weights)
            F.threshold_(weights, NEGLIGIBLE, 0.0)
        if head_weights is not None:
            weights = head_weights[start : start + chunk].copy_(weights)
        torch.bmm(weights.to(v.dtype).flatten(0, 1), v, out=output[start : start + chunk].flatten(0, 1))
    return output.transpose(0, 1), attention.div_(heads), head_weights


def heads_per_chunk(query: Tensor) -> int:
    """Return how many heads `attend_with_weights` computes at once for `query` (B, heads, L, 64).

    On a CPU it is 1: the scores of one head fit in the cache, which halves the time.
    """
    batch, heads, length, _ = query.shape
    bytes_per_head = batch * length**2 * (query.element_size() + 4)  # scores, and weights in float32
    return 1 if query.device.type == "cpu" else min(heads, max(1, CHUNK_BYTES // bytes_per_head))


class Attention(nn.Module):
    """Multi-head self-attention with packed query, key and value projections."""

    attend = staticmethod(attend_with_weights)  # `CLIP.compile_blocks` replaces it by an uncompiled version

    def __init__(self, width: int):
        super().__init__()
        self.heads = width // HEAD_WIDTH
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, each (B, heads, L, 64), of tokens (B, L, C)."""
        packed = F.linear(x, self.in_proj_weight, self.in_proj_bias)  # (B, L, 3C)
        return packed.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x, mask=None, need_weights=False) -> tuple[Tensor, Tensor | None]:
        """Return tokens (B, L, C) and attention (B, L, L) or None, see `VisionTransformer.block`."""
        query, key, value = self.qkv(x)
        attention = None
        if need_weights:
            output, attention, _ = self.attend(query, key, value, mask)
        else:
            output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out_proj(output.transpose(1, 2).flatten(2)), attention


class Block(nn.Module):
    """Pre-norm residual block: x = x + attn(ln_1(x)), then x + mlp(ln_2(x))."""

    def __init__(self, width: int, activation: str):
        super().__init__()
        self.attn = Attention(width)
        self.ln_1 = LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=nn.Linear(width, 4 * width),
                gelu=ACTIVATIONS[activation](),
                c_proj=nn.Linear(4 * width, width),
            )
        )
        self.ln_2 = LayerNorm(width)

    def forward(self, x, mask=None, need_weights=False, ln1_output=None) -> tuple[Tensor, Tensor | None]:
        """See `VisionTransformer.block`."""
        output, attention = self.attn(self.ln_1(x) if ln1_output is None else ln1_output, mask, need_weights)
        x = output.add_(x)
        return self.mlp(self.ln_2(x)).add_(x), attention


class Transformer(nn.Module):
    """A stack of blocks; a separate module only to match the parameter names in checkpoints."""

    def __init__(self, width: int, layers: int, activation: str):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, activation) for _ in range(layers))


class VisionTransformer(nn.Module):
    """The ViT image tower, for images whose sides are multiples of the patch size."""

    def __init__(self, config: Config):
        super().__init__()
        width = config.vision_width
        self.patch_size = config.patch_size
        self.grid = config.image_resolution // config.patch_size
        self.conv1 = nn.Conv2d(3, width, config.patch_size, config.patch_size, bias=False)
        self.class_embedding = normal(width, std=width**-0.5)
        self.positional_embedding = normal(self.grid**2 + 1, width, std=width**-0.5)
        self.ln_pre = LayerNorm(width)
        self.transformer = Transformer(width, config.vision_layers, config.activation)
        self.ln_post = LayerNorm(width)
        self.proj = normal(width, config.embed_dim, std=width**-0.5)

    @property
    def layers(self) -> int:
        return len(self.transformer.resblocks)

    def embed(self, images: Tensor, position_rounding: str = "always") -> tuple[Tensor, tuple[int, int]]:
        """Return the input tokens of the first block (B, 1 + hw, C), class token first, and the grid (h, w).

        Args:
            images: (B, 3, H', W'), normalized.
            position_rounding: see `resample_positions`.

        Raises:
            ValueError: a side is not a multiple of the patch size.
        """
        if images.shape[-2] % self.patch_size or images.shape[-1] % self.patch_size:
            raise ValueError(
                f"image sides {tuple(images.shape[-2:])} are not multiples of the patch size "
                f"{self.patch_size}: resize images to `clip.target_size`"
            )
        patches = self.conv1(images.to(self.conv1.weight.dtype))  # (B, C, h, w)
        grid = patches.shape[-2:]
        class_tokens = self.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        tokens = torch.cat([class_tokens, patches.flatten(2).mT], 1)  # (B, 1 + hw, C)
        positions = resample_positions(self.positional_embedding, self.grid, *grid, position_rounding)
        return self.ln_pre(tokens + positions.to(tokens.dtype)), tuple(grid)

    def block(
        self,
        index: int,
        tokens: Tensor,
        mask: Tensor | None = None,
        need_weights: bool = False,
        ln1_output: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output tokens (B, L, C) of a block, and its attention (B, L, L) float32 or None.

        Args:
            index: 0-based; a negative index counts from the end.
            tokens: (B, L, C), input of the block.
            mask: additive, broadcastable to (B, heads, L, L).
            need_weights: return attention without the mask, averaged over heads. If False, the block uses
                fused attention and returns None.
            ln1_output: (B, L, C) that replaces ln_1(tokens); Grad-CAM differentiates with respect to it.
        """
        return self.transformer.resblocks[index](tokens, mask, need_weights, ln1_output)

    def blocks(
        self,
        tokens: Tensor,
        start: int = 0,
        stop: int | None = None,
        mask: Tensor | None = None,
        need_weights: bool = False,
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Run blocks start, ..., stop - 1 and yield the result of each, see `block`.

        `start` and `stop` work as in a slice: stop None includes the last block, stop -1 excludes it.
        """
        for index in range(*slice(start, stop).indices(self.layers)):
            tokens, attention = self.block(index, tokens, mask, need_weights)
            yield tokens, attention

    def project(self, tokens: Tensor) -> Tensor:
        """Return tokens (..., C) of the last block, projected to the space shared with text, (..., E)."""
        return self.ln_post(tokens) @ self.proj

    def forward(self, images: Tensor, position_rounding: str = "always") -> Tensor:
        """Return the class token's feature (B, E), not normalized, of images (B, 3, H', W')."""
        tokens, _ = self.embed(images, position_rounding)
        *_, (tokens, _) = self.blocks(tokens)
        return self.project(tokens[:, 0])


class CLIP(nn.Module):
    """An image tower, `visual`, and a text tower that share an embedding space."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.visual = VisionTransformer(config) if config.patch_size else ModifiedResNet(config)
        self.transformer = Transformer(config.text_width, config.text_layers, config.activation)
        words = normal(config.vocab_size, config.text_width, std=1.0)
        self.token_embedding = nn.Embedding.from_pretrained(words, freeze=False)
        self.positional_embedding = normal(config.context_length, config.text_width, std=0.01)
        self.ln_final = LayerNorm(config.text_width)
        self.text_projection = normal(config.text_width, config.embed_dim, std=config.text_width**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @property
    def device(self) -> torch.device:
        return self.logit_scale.device

    def visual_precision(self, dtype: torch.dtype) -> None:
        """Convert the image tower's matrices, and thereby its products, to `dtype`; norms stay float32."""
        for parameter in matrices(self.visual):
            parameter.data = parameter.data.to(dtype)

    def compile_blocks(self) -> None:
        """Compile each block of the image tower, except `attend_with_weights`, which reuses its buffers."""
        for module in self.visual.modules():
            if isinstance(module, Attention):
                module.attend = torch.compiler.disable(attend_with_weights)
            elif isinstance(module, Block | Bottleneck):
                module.compile()

    def forget_text_tower(self) -> None:
        """Delete the text tower, two fifths of the weights of ViT-B/16; afterwards `encode_text` fails."""
        del self.transformer, self.token_embedding

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Return text features (N, E), not normalized, of token ids (N, context_length).

        Raises:
            ValueError: the number of ids per text is not `context_length`.
        """
        context = len(self.positional_embedding)
        if tokens.shape[-1] != context:
            raise ValueError(f"text must be {context} tokens long, got {tokens.shape[-1]}")
        ends = tokens.argmax(-1)  # (N,); the end-of-text token has the largest id
        length = max(ends.tolist(), default=0) + 1  # attention is causal: later tokens have no effect
        x = self.token_embedding(tokens[:, :length]) + self.positional_embedding[:length]  # (N, length, C)
        x = x.to(self.text_projection.dtype)
        causal = torch.full((length, length), float("-inf"), device=x.device, dtype=x.dtype).triu(1)
        for block in self.transformer.resblocks:
            x, _ = block(x, mask=causal)
        x = self.ln_final(x)[torch.arange(len(x), device=x.device), ends]  # (N, text width)
        return x @ self.text_projection


def matrices(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters, of a CLIP or of one tower, that OpenAI's checkpoints store in float16.

    These are all parameters except norms, embeddings and the logit scale.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            yield from module.parameters(recurse=False)
        elif isinstance(module, Attention):
            yield from (module.in_proj_weight, module.in_proj_bias)
        elif isinstance(module, VisionTransformer):
            yield module.proj
        elif isinstance(module, CLIP):
            yield module.text_projection
