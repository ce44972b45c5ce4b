"""The dense CRF in tensor operations, for many images at once on a GPU.

The mathematics is the same as in `refinement.densecrf_numba`: an update is softmax(S B S' q - energies) with
a sparse matrix S of 9 entries per pixel. All images of a group share one lattice: the image number is the
highest digit of a point's key, and class channels are padded with classes of probability 0. Sorting the keys
gives the points their numbers, and puts the entries of S' in the order of summation. Slice, splat and blur
are weighted sums of rows, computed by `embedding_bag`.

In a smooth image, one lattice point sums over thousands of pixels. S' therefore sums runs of 32 entries
first, then runs of these sums, and so on. Without atomic additions the result is the same in every run. On a
CPU it equals the numba backend up to the last few bits.

An update moves about 2 kB per pixel (3 classes, photographs with 2.6 lattice points per pixel) in about 50
kernel launches. Building the lattices takes about 200 launches and a sort of 9 keys per pixel, once per
group. The CPU waits for the GPU only in this step, about ten times.

Memory with 3 classes: 600 to 700 bytes per pixel of a group for photographs, up to 1400 for noise.
"""

import math
from collections.abc import Iterator, Sequence
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from refinement.lattice import MAX_KEYS, Kernel, Packing, packing
from refinement.presets import MEAN_BGR, Preset, unary

GROUP_PIXELS = 2**22  # maximum pixels of the images that share a lattice; they need 3 to 6 GB
RUN = 32  # entries summed by one thread


class Lattice(NamedTuple):
    """S and B of one kernel, for N pixels and M lattice points."""

    points: Tensor  # (N, d + 1) int32, lattice points of each pixel
    weights: Tensor  # (N, d + 1) float32, with normalization and square root of Potts weight
    pixels: Tensor  # (N * (d + 1),) int32, pixel of each entry of S', sorted by lattice point
    pixel_weights: Tensor  # (N * (d + 1),) float32, weights in the order of `pixels`
    runs: list[Tensor]  # int32, starts of the runs that are summed, see `_runs`
    neighbors: list[Tensor]  # per direction (M, 2) int32, the points before and after; M: no neighbor


def _embed(features: Tensor, pack: Packing) -> tuple[Tensor, Tensor]:
    """Return keys and weights, (d + 1, N) int64 and float32, of the simplex vertices of features (d, N).

    The operations have the order of the reference implementation, so that the lattice is the same.
    """
    device, d = features.device, len(features)
    total, elevated = torch.zeros_like(features[0]), []
    for j in range(d, 0, -1):
        scaled = features[j - 1] * float(pack.scale[j - 1])
        elevated.append(total - j * scaled)
        total = total + scaled
    elevated = torch.stack([total, *reversed(elevated)])  # (d + 1, N)
    down = float(np.float32(1) / np.float32(d + 1))
    # Find the nearest point with all coordinates 0 modulo d + 1, then rank the differences to it.
    nearest = torch.round(elevated * down)
    off_plane = nearest.sum(0).long()
    nearest = nearest * (d + 1)
    excess = elevated - nearest
    rank = torch.stack(
        [(excess[:i] >= excess[i]).sum(0) + (excess[i + 1 :] > excess[i]).sum(0) for i in range(d + 1)]
    )
    rank += off_plane
    turn = (d + 1) * ((rank < 0).long() - (rank > d).long())
    rank += turn
    vertex = turn.add_(nearest.long())
    height = torch.empty_like(elevated).scatter_(0, rank, (elevated - vertex) * down)  # by rank
    weights = torch.cat([height[d:] + (1 - height[:1]), (height[:-1] - height[1:]).flip(0)])
    # Each vertex of the simplex is one step along a direction away from the previous one, by descending rank.
    strides, low = (torch.tensor(values, device=device)[:, None] for values in (pack.strides, pack.low))
    jumps = torch.tensor(pack.jumps, device=device)[:, None].expand(d + 1, rank.shape[1])
    keys = torch.empty_like(rank).scatter_(0, (d + 1 - rank) % (d + 1), jumps)
    keys[0] = ((vertex[:d] - low) * strides).sum(0)
    return keys.cumsum(0), weights


def _runs(point: Tensor, points: int) -> list[Tensor]:
    """Return the starts of the runs to sum: of entries, then of the sums of these runs, and so on.

    A run has at most RUN entries, all of one lattice point. The last list has one run per point.

    Args:
        point: lattice point of each entry, (E,) int32, sorted; each of 0..points-1 occurs at least once.
        points: number of lattice points.
    """
    runs, all_points = [], torch.arange(points, device=point.device, dtype=torch.int32)
    while not runs or len(runs[-1]) > points:
        starts = torch.searchsorted(point, all_points, out_int32=True)  # first entry of each point
        entry = torch.arange(len(point), device=point.device, dtype=torch.int32)
        cuts = ((entry - starts.index_select(0, point)) % RUN == 0).nonzero()[:, 0]
        runs.append(cuts.int())
        point = point[cuts]
    return runs


def _lattice(features: Tensor, image: Tensor, kernel: Kernel, pack: Packing) -> Lattice:
    """Return the lattice of one kernel for several images.

    Args:
        features: (d, N) float32, see `_features`.
        image: (N,) int64, the image number of each pixel.
        kernel: kernel of the lattice.
        pack: packing of its keys.
    """
    device, entries = features.device, len(features) + 1
    keys, weights = _embed(features, pack)  # (d + 1, N)
    keys += image * pack.keys
    keys, order = keys.T.reshape(-1).sort(stable=True)  # (N * entries,)
    is_first = torch.ones_like(keys, dtype=torch.bool)
    is_first[1:] = keys[1:] != keys[:-1]
    keys = keys[is_first]  # (M,)
    size = len(keys)
    point = is_first.cumsum(0, dtype=torch.int32) - 1
    points = torch.empty_like(point)
    points[order] = point

    neighbors = []
    for jump in pack.jumps:
        after = torch.searchsorted(keys, keys + jump).clamp_(max=size - 1)
        after = torch.where(keys[after] == keys + jump, after, size)
        before = torch.full((size + 1,), size, device=device)
        before[after] = torch.arange(size, device=device)
        neighbors.append(torch.stack([before[:size], after], 1).int())

    weights = weights.T.contiguous()  # (N, entries)
    lattice = Lattice(
        points=points.view(-1, entries),
        weights=weights,
        pixels=(order // entries).int(),
        pixel_weights=weights.view(-1)[order],
        runs=_runs(point, size),
        neighbors=neighbors,
    )
    total = _filter(lattice, features.new_ones(len(weights), 1)) * kernel.alpha  # (N, 1)
    weights = weights * (math.sqrt(kernel.alpha * kernel.compat) / (total + 1e-20).sqrt())
    return lattice._replace(weights=weights, pixel_weights=weights.view(-1)[order])


def _filter(lattice: Lattice, values: Tensor) -> Tensor:
    """Return S B S' values for values (N, C)."""
    sums = partial(F.embedding_bag, mode="sum")  # sums rows of values over each bag of row numbers
    values = sums(lattice.pixels, values, lattice.runs[0], per_sample_weights=lattice.pixel_weights)
    for starts in lattice.runs[1:]:
        values = sums(torch.arange(len(values), device=starts.device, dtype=torch.int32), values, starts)
    values = F.pad(values, (0, 0, 0, 1))  # (M + 1, C); the last row, 0, replaces missing neighbors
    for pairs in lattice.neighbors:
        values[:-1].add_(sums(pairs, values), alpha=0.5)
    return sums(lattice.points, values, per_sample_weights=lattice.weights)


def _features(guides: Sequence[Tensor], widths: Sequence[float]) -> Tensor:
    """Return position (and color if d is 5) of all pixels, divided by the kernel's widths, (d, N) float32."""
    device = guides[0].device
    columns = []
    for guide in guides:
        sides = [torch.arange(side, device=device, dtype=torch.float32) for side in guide.shape[:2]]
        y, x = torch.meshgrid(*sides, indexing="ij")
        columns.append(torch.stack([x, y, *guide.float().unbind(-1)][: len(widths)]).flatten(1))  # (d, H * W)
    # The divisor is a tensor: for a number, CUDA multiplies by the reciprocal, which rounds differently.
    return torch.cat(columns, 1) / torch.tensor(widths, device=device, dtype=torch.float32)[:, None]


def _groups(sizes: Sequence[tuple[int, int]], kernels: Sequence[Kernel]) -> Iterator[list[int]]:
    """Yield groups of consecutive images that share a lattice, limited by GROUP_PIXELS and MAX_KEYS."""

    def fits(group: list[int]) -> bool:
        sides = [max(side) for side in zip(*(sizes[i] for i in group), strict=True)]
        keys = max(packing(kernel.widths, *sides).keys for kernel in kernels)
        return sum(math.prod(sizes[i]) for i in group) <= GROUP_PIXELS and keys * len(group) < MAX_KEYS

    group: list[int] = []
    for index in range(len(sizes)):
        if group and not fits([*group, index]):
            yield group
            group = []
        group.append(index)
    if group:
        yield group


@cache
def _half_energies(preset: Preset, device: torch.device) -> Tensor:
    """Return the energy of every float16 number, (65536,); NumPy computes it, so all devices get the same."""
    with np.errstate(invalid="ignore"):
        energies = unary(np.arange(2**16, dtype=np.uint16).view(np.float16), preset)
    return torch.from_numpy(energies).to(device)


def _unary(probabilities: Tensor, preset: Preset) -> Tensor:
    """Return `refinement.presets.unary` of a tensor, computed on its device."""
    if preset.unary_type == "float16":
        bits = probabilities.half().contiguous().view(torch.int16).int() & 0xFFFF
        table = _half_energies(preset, probabilities.device)
        return table.index_select(0, bits.flatten()).view(bits.shape)
    return -probabilities.float().clamp(preset.clip, 1).log()


def _guide_image(image: Tensor, preset: Preset) -> Tensor:
    """Return `refinement.presets.guide_image` of a tensor, computed on its device."""
    if preset.image_mode == "raw":
        return image
    bgr = image.flip(-1)
    if preset.image_mode == "bgr":
        return bgr
    shifted = bgr.float() - torch.from_numpy(MEAN_BGR).to(image.device)
    return (shifted.trunc().int() % 256).byte()


@torch.inference_mode()
def infer(images: Sequence[Tensor], probabilities: Sequence[Tensor], preset: Preset) -> list[Tensor]:
    """Return the class posteriors of images on one device, see `refinement.densecrf.densecrf_batch`."""
    kernels, posteriors = preset.kernels(), []
    for group in _groups([tuple(image.shape[:2]) for image in images], kernels):
        guides = [_guide_image(images[i], preset) for i in group]
        energies = [_unary(probabilities[i], preset) for i in group]
        posteriors += _mean_field(guides, energies, kernels, preset.iterations)
    return posteriors


def _mean_field(
    guides: Sequence[Tensor], energies: Sequence[Tensor], kernels: Sequence[Kernel], iterations: int
) -> list[Tensor]:
    """Return the posteriors of one group of images.

    Args:
        guides: (H, W, 3) uint8 for each image.
        energies: (C, H, W) float32 for each image.
    """
    device, sizes = guides[0].device, [guide.shape[:2] for guide in guides]
    sides = [max(side) for side in zip(*sizes, strict=True)]
    pixels = [math.prod(size) for size in sizes]
    image = torch.cat([torch.full((count,), i, device=device) for i, count in enumerate(pixels)])
    lattices = [
        _lattice(_features(guides, kernel.widths), image, kernel, packing(kernel.widths, *sides))
        for kernel in kernels
    ]
    logits = torch.full((sum(pixels), max(map(len, energies))), -math.inf, device=device)
    for energy, rows in zip(energies, logits.split(pixels), strict=True):
        rows[:, : len(energy)] = -energy.flatten(1).T
    posterior = logits.softmax(1)  # (N, C)
    for _ in range(iterations):
        update = logits
        for lattice in lattices:
            update = update + _filter(lattice, posterior)
        posterior = update.softmax(1)
    return [
        rows[:, : len(energy)].T.reshape(energy.shape)
        for energy, rows in zip(energies, posterior.split(pixels), strict=True)
    ]
