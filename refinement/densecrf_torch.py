"""The dense CRF in tensor operations, for many images at once on a GPU.

The same mathematics as `refinement.densecrf_numba`: an update is softmax(S B S' q - energies) with a sparse
matrix S of 9 entries per pixel. All images of a group share one lattice: the image's number is the highest
digit of a point's key, and channels are padded with impossible classes. Sorting the keys numbers the points
and orders the entries of S' for summation. Slice, splat and blur are weighted sums of rows, `embedding_bag`.

A lattice point of a plain image gathers many thousand pixels, so S' sums runs of 32 entries first, then runs
of those sums, and so on. Without atomic additions the result is the same each time, and on a CPU equals that
of numba up to the last few bits.

An update moves about 2 kB per pixel (3 classes, photographs with 2.6 lattice points per pixel) in about 50
kernel launches. Building the lattices takes about 200 and a sort of 9 keys per pixel, once per group, and is
the only step in which the host waits for the device, about ten times.

Memory at 3 classes: 600 to 700 bytes per pixel of a group for photographs, up to 1400 for noise.
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

GROUP_PIXELS = 2**22  # total pixels of the images that share a lattice: 3 to 6 GB
RUN = 32  # entries summed by one thread


class Lattice(NamedTuple):
    """S and B of one kernel, for N pixels and M lattice points."""

    points: Tensor  # (N, d + 1) int32, lattice points of each pixel
    weights: Tensor  # (N, d + 1) float32, with normalization and Potts weight
    pixels: Tensor  # (N * (d + 1),) int32, pixel of each entry, sorted by lattice point
    pixel_weights: Tensor  # (N * (d + 1),) float32, weights in that order
    runs: list[Tensor]  # starts of sums of these entries, of sums of those sums, ..., int32, see `_runs`
    neighbors: list[Tensor]  # (M, 2) int32 for each direction, points before and after; M is none


def _embed(features: Tensor, pack: Packing) -> tuple[Tensor, Tensor]:
    """Return keys and weights, (d + 1, N) int64 and float32, of the simplexes of features (d, N) float32.

    Every operation is in the order of Kraehenbuehl's code, so that the lattice is the same.
    """
    device, d = features.device, len(features)
    total, elevated = torch.zeros_like(features[0]), []
    for j in range(d, 0, -1):
        scaled = features[j - 1] * float(pack.scale[j - 1])
        elevated.append(total - j * scaled)
        total = total + scaled
    elevated = torch.stack([total, *reversed(elevated)])  # (d + 1, N)
    down = float(np.float32(1) / np.float32(d + 1))
    # The nearest point with all coordinates 0 modulo d + 1, then the order of what remains.
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
    # From vertex to vertex of the simplex, a step along one direction each, that of the highest rank first.
    strides, low = (torch.tensor(values, device=device)[:, None] for values in (pack.strides, pack.low))
    jumps = torch.tensor(pack.jumps, device=device)[:, None].expand(d + 1, rank.shape[1])
    keys = torch.empty_like(rank).scatter_(0, (d + 1 - rank) % (d + 1), jumps)
    keys[0] = ((vertex[:d] - low) * strides).sum(0)
    return keys.cumsum(0), weights


def _runs(point: Tensor, points: int) -> list[Tensor]:
    """Return where runs of at most RUN entries of one point start, then runs of their sums, and so on.

    `point` is the lattice point of each entry, (E,) int32, sorted, each of 0..points-1 at least once.
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
    """Return the lattice of one kernel for features (d, N) of pixels of several images; image: (N,) int64."""
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
    """Return S B S' values, (N, C)."""
    sums = partial(F.embedding_bag, mode="sum")  # of rows of values, over each bag of row numbers
    values = sums(lattice.pixels, values, lattice.runs[0], per_sample_weights=lattice.pixel_weights)
    for starts in lattice.runs[1:]:
        values = sums(torch.arange(len(values), device=starts.device, dtype=torch.int32), values, starts)
    values = F.pad(values, (0, 0, 0, 1))  # (M + 1, C), the last is for missing neighbors
    for pairs in lattice.neighbors:
        values[:-1].add_(sums(pairs, values), alpha=0.5)
    return sums(lattice.points, values, per_sample_weights=lattice.weights)


def _features(guides: Sequence[Tensor], widths: Sequence[float]) -> Tensor:
    """Return position and color of all pixels, divided by the kernel's widths, (d, N) float32."""
    device = guides[0].device
    columns = []
    for guide in guides:
        sides = [torch.arange(side, device=device, dtype=torch.float32) for side in guide.shape[:2]]
        y, x = torch.meshgrid(*sides, indexing="ij")
        columns.append(torch.stack([x, y, *guide.float().unbind(-1)][: len(widths)]).flatten(1))  # (d, H * W)
    # Divided by a tensor: by a number, CUDA would multiply with the reciprocal and round differently.
    return torch.cat(columns, 1) / torch.tensor(widths, device=device, dtype=torch.float32)[:, None]


def _groups(sizes: Sequence[tuple[int, int]], kernels: Sequence[Kernel]) -> Iterator[list[int]]:
    """Yield runs of consecutive images that share a lattice, limited by GROUP_PIXELS and the key range."""

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
    """Return the energy of every float16, (65536,), computed by NumPy: the same on every device."""
    with np.errstate(invalid="ignore"):
        energies = unary(np.arange(2**16, dtype=np.uint16).view(np.float16), preset)
    return torch.from_numpy(energies).to(device)


def _unary(probabilities: Tensor, preset: Preset) -> Tensor:
    """Compute `refinement.presets.unary` on a device."""
    if preset.unary_type == "float16":
        bits = probabilities.half().contiguous().view(torch.int16).int() & 0xFFFF
        table = _half_energies(preset, probabilities.device)
        return table.index_select(0, bits.flatten()).view(bits.shape)
    return -probabilities.float().clamp(preset.clip, 1).log()


def _guide_image(image: Tensor, preset: Preset) -> Tensor:
    """Compute `refinement.presets.guide_image` on a device."""
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
    """Return the posteriors of one group: guides (H, W, 3) uint8 and energies (C, H, W) float32 each."""
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
