"""The dense CRF on one CPU core: the permutohedral lattice compiled by numba.

One mean-field update is softmax(S B S' q - energies). S' adds the probabilities q of each pixel to the
lattice points around it ("splat"), B blurs along the lattice directions, S interpolates at the pixels
("slice"). S has 3 entries per pixel for the smoothness kernel and 6 for the appearance kernel. S and S' each
contain the normalization and the square root of the Potts weight, so both kernels together are one sparse
matrix. An update reads it once: slice, softmax and the next splat run pixel by pixel.

The blur processes each line of neighboring points ("chain") in place. It skips points without neighbors,
which are frequent in textured images. Class channels are the innermost dimension, padded to one of `LANES`.
One vector instruction (`Lanes`) computes them all; the compiler does not vectorize a loop over classes.

The code releases the GIL, so threads can refine several images in parallel, each on one core. Compiled code
is cached in this file's folder, or in the user's cache folder if this one is read-only (NUMBA_CACHE_DIR sets
another folder). numba invalidates the cache when this file changes, but not when an imported file changes, so
all compiled functions must be in this file.

Memory with up to 4 classes: 300 to 350 bytes per pixel for photographs, up to 570 for noise.
"""

import math

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, models, register_model

from refinement.lattice import Kernel, packing

LANES = (4, 8, 16)  # classes computed at once; more classes are split into blocks
TILE = 64  # pixels per vectorized softmax; their values fit in the first-level cache
FIRST_SLOTS = 1 << 14  # initial size of the hash table, which is doubled when half full
# Smaller probabilities become 0, because products with them would be denormal numbers, which are slow.
MIN_PROBABILITY = np.float32(1e-26)
JIT = {"cache": True, "nogil": True, "error_model": "numpy"}
# Contraction (fused multiply-add) changes the rounding, so it must not be used where rounding selects a
# lattice point.
JIT_CONTRACT = JIT | {"fastmath": {"contract", "nsz"}}


class Lanes(types.Type):
    """Numba type of a vector of `width` float32 in a register."""

    def __init__(self, width: int):
        self.width = width
        super().__init__(name=f"float32x{width}")


@register_model(Lanes)
class LanesModel(models.PrimitiveModel):
    def __init__(self, manager, lanes):
        super().__init__(manager, lanes, ir.VectorType(ir.FloatType(), lanes.width))


def _address(context, builder, signature, arguments, width):
    """Return a pointer to row arguments[1] of array arguments[0]; a row is a vector of `width` float32."""
    data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
    row = context.cast(builder, arguments[1], signature.args[1], types.intp)
    start = builder.gep(data, [builder.mul(row, row.type(width))])
    return builder.bitcast(start, ir.VectorType(ir.FloatType(), width).as_pointer())


@intrinsic
def load(typing, array, row, lanes):
    """load(array, row, lanes): return a row of a C-contiguous float32 array; a row has len(lanes) values."""

    def generate(context, builder, signature, arguments):
        return builder.load(_address(context, builder, signature, arguments, lanes.count), align=4)

    return Lanes(lanes.count)(array, row, lanes), generate


@intrinsic
def store(typing, array, row, vector):
    """store(array, row, vector): write a row, see `load`."""

    def generate(context, builder, signature, arguments):
        builder.store(arguments[2], _address(context, builder, signature, arguments, vector.width), align=4)
        return context.get_dummy_value()

    return types.void(array, row, vector), generate


@intrinsic
def madd(typing, total, weight, vector):
    """madd(total, weight, vector): return the vector total + weight * vector, for a float32 weight."""

    def generate(context, builder, signature, arguments):
        start, factor, value = arguments
        undefined = ir.Constant(start.type, ir.Undefined)
        first = builder.insert_element(undefined, factor, ir.Constant(ir.IntType(32), 0))
        pattern = ir.Constant(ir.VectorType(ir.IntType(32), start.type.count), [0] * start.type.count)
        repeated = builder.shuffle_vector(first, undefined, pattern)
        return builder.fadd(start, builder.fmul(repeated, value, flags=["contract"]), flags=["contract"])

    return total(total, types.float32, vector), generate


# Variable array indices below are cast to unsigned, because numba checks signed indices for negative values.


@njit(**JIT)
def _slot(table, keys, key):
    """Return the slot of `key` in the hash table, or the free slot for it.

    Args:
        table: (2^k,) int32, indices into `keys`, or -1 for free slots.
        keys: int64 keys.
    """
    mask = len(table) - 1
    slot = np.int64((np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(24)) & mask
    while True:
        index = table[np.uint64(slot)]
        if index < 0 or keys[np.uint64(index)] == key:
            return slot
        slot = (slot + 1) & mask


@njit(**JIT)
def _enlarge(keys, count, slots):
    """Return a hash table of `slots` slots with the first `count` keys, and these keys in a larger array."""
    table = np.full(slots, -1, np.int32)
    larger = np.empty(slots // 2, np.int64)
    larger[:count] = keys[:count]
    for index in range(count):
        table[_slot(table, larger, larger[index])] = index
    return table, larger


@njit(**JIT)
def embed(image, widths, scale, low, strides, points, weights, column, offset):
    """Return the packed keys (M,) int64 of an image's lattice points; write points and weights of each pixel.

    Operations are float32, in the order of the reference implementation, so that the lattice is the same.

    Args:
        image: (H, W, d - 2) uint8.
        widths, scale, low, strides: tuples of d numbers, see `refinement.lattice`.
        points, weights: (H * W, entries) int32 and float32; columns `column` to `column` + d are written.
        column: first column to write.
        offset: number of the first point; points are numbered in order of appearance.
    """
    height, width, colors = image.shape
    d = len(scale)
    table, keys, count = np.full(FIRST_SLOTS, -1, np.int32), np.empty(FIRST_SLOTS // 2, np.int64), 0
    stride = np.zeros(d + 1, np.int64)  # 0 for the last coordinate, which is not packed
    origin = np.int64(0)
    factor, feature, extent = np.empty(d, np.float32), np.empty(d, np.float32), np.empty(d, np.float32)
    for i in range(d):
        stride[i], factor[i], extent[i] = strides[i], scale[i], widths[i]
        origin -= low[i] * strides[i]
    jump = stride.sum() - (d + 1) * stride
    elevated, excess = np.empty(d + 1, np.float32), np.empty(d + 1, np.float32)
    vertex, rank, ranked = np.empty(d + 1, np.int64), np.empty(d + 1, np.int64), np.empty(d + 1, np.int64)
    height_of_rank = np.empty(d + 1, np.float32)
    last_key, last_point = np.full(d + 1, -1, np.int64), np.zeros(d + 1, np.int32)
    one, up, down = np.float32(1), np.float32(d + 1), np.float32(1) / np.float32(d + 1)
    pixel = 0
    for y in range(height):
        for x in range(width):
            feature[0], feature[1] = np.float32(x) / extent[0], np.float32(y) / extent[1]
            for c in range(colors):
                feature[2 + c] = np.float32(image[y, x, c]) / extent[2 + c]
            total = np.float32(0)
            for j in range(d, 0, -1):
                scaled = feature[j - 1] * factor[j - 1]
                elevated[j] = total - np.float32(j) * scaled
                total += scaled
            elevated[0] = total

            # Find the nearest point with all coordinates 0 modulo d + 1, then rank the differences to it.
            off_plane = 0
            for i in range(d + 1):
                nearest = np.rint(elevated[i] * down)
                off_plane += np.int64(nearest)
                vertex[i] = np.int64(nearest) * (d + 1)
                excess[i] = elevated[i] - nearest * up
                rank[i] = 0
            for i in range(d):
                for j in range(i + 1, d + 1):
                    less = np.int64(excess[i] < excess[j])
                    rank[i] += less
                    rank[j] += 1 - less
            packed = origin
            for i in range(d + 1):
                place = rank[i] + off_plane
                if place < 0:
                    place += d + 1
                    vertex[i] += d + 1
                elif place > d:
                    place -= d + 1
                    vertex[i] -= d + 1
                height_of_rank[np.uint64(place)] = (elevated[i] - np.float32(vertex[i])) * down
                ranked[np.uint64(place)] = i
                packed += vertex[i] * stride[i]

            # Each vertex of the simplex is one step along a lattice direction away from the previous vertex.
            for r in range(d + 1):
                if r == 0:
                    weight = height_of_rank[d] + (one - height_of_rank[0])
                else:
                    packed += jump[np.uint64(ranked[d + 1 - r])]
                    weight = height_of_rank[d - r] - height_of_rank[d + 1 - r]
                weights[pixel, column + r] = weight
                if last_key[r] != packed:  # neighboring pixels often have the same vertex
                    slot = _slot(table, keys, packed)
                    index = table[slot]
                    if index < 0:
                        if 2 * count >= len(table):
                            table, keys = _enlarge(keys, count, 2 * len(table))
                            slot = _slot(table, keys, packed)
                        index = np.int32(count)
                        table[slot] = index
                        keys[count] = packed
                        count += 1
                    last_key[r], last_point[r] = packed, index
                points[pixel, column + r] = last_point[r] + offset
            pixel += 1
    return keys[:count].copy()


@njit(**JIT)
def link(keys, order, jumps, offset):
    """Return the chains of two or more points, for all directions, as one array (L,) int32.

    The last point p of a chain is stored as ~p. A step along a direction adds a constant to a key, so one
    pass over the sorted keys finds the successors of all points.

    Args:
        keys: (M,) int64.
        order: (M,), the indices that sort `keys`.
        jumps: (d + 1,) int64, see `refinement.lattice.Packing`.
        offset: added to the point numbers.
    """
    count = len(keys)
    ordered = keys[order]
    chains = np.empty(len(jumps) * count, np.int32)
    successor, has_predecessor = np.empty(count, np.int32), np.empty(count, np.bool_)
    length = 0
    for jump in jumps:
        has_predecessor[:] = False
        candidate = 0
        for point in range(count):
            next_key = ordered[point] + jump
            while candidate < count and ordered[candidate] < next_key:
                candidate += 1
            if candidate < count and ordered[candidate] == next_key:
                successor[point] = candidate
                has_predecessor[candidate] = True
            else:
                successor[point] = -1
        for first in range(count):
            if has_predecessor[first] or successor[first] < 0:
                continue
            point = np.int32(first)
            while point >= 0:
                chains[length] = order[np.uint64(point)] + offset
                length += 1
                point = successor[np.uint64(point)]
            chains[length - 1] = ~chains[length - 1]
    return chains[:length].copy()


@njit(**JIT)
def _blur(values, chains, lanes, blocks):
    """For each direction, add half of its neighbors' sum to each row of values (points, blocks * lanes)."""
    half, one = np.float32(0.5), np.float32(1)
    for block in range(blocks):
        index = 0
        while index < len(chains):
            row = np.int64(chains[index]) * blocks + block
            value = load(values, row, lanes)
            before = madd(value, -one, value)
            ended = False
            while not ended:
                index += 1
                point = np.int64(chains[index])
                ended = point < 0
                if ended:
                    point = ~point
                next_row = point * blocks + block
                after = load(values, next_row, lanes)
                store(values, row, madd(value, half, madd(before, one, after)))
                before, value, row = value, after, next_row
            store(values, row, madd(value, half, before))
            index += 1


@njit(**JIT)
def normalize(points, weights, chains, size, first, last, alpha, compat):
    """Multiply columns `first` to `last` - 1 of `weights` by the normalization and sqrt(alpha * compat).

    The normalization is pydensecrf's: 1 / sqrt(F(1) + 1e-20) before and after the filter F. The weights are
    used before and after the filter, so each time they contribute the square root of `alpha * compat`.

    Args:
        points, weights, chains: see `embed` and `link`.
        size: number of lattice points.
        alpha, compat: see `refinement.lattice.Kernel`.
    """
    values = np.zeros((size, 1), np.float32)
    for pixel in range(len(points)):
        for r in range(first, last):
            values[np.uint64(points[pixel, r]), 0] += weights[pixel, r]
    _blur(values, chains, (np.float32(0),), 1)
    gain = np.float32(math.sqrt(alpha * compat))
    for pixel in range(len(points)):
        total = np.float32(0)
        for r in range(first, last):
            total += weights[pixel, r] * values[np.uint64(points[pixel, r]), 0]
        factor = gain / np.sqrt(total * np.float32(alpha) + np.float32(1e-20))
        for r in range(first, last):
            weights[pixel, r] *= factor


@njit(**JIT_CONTRACT)
def _softmax(tile, powers, channels):
    """Apply softmax to the first `channels` of each row of `tile` (T, lanes), in place.

    The exponential is 2^k times a polynomial on [-ln 2 / 2, ln 2 / 2] (coefficients as in Cephes' expf,
    error 1e-7), written so that the compiler vectorizes it. `powers` is a buffer of the same shape.
    """
    for i in range(len(tile)):
        highest = tile[i, 0]
        for c in range(1, channels):
            highest = max(highest, tile[i, c])
        for c in range(tile.shape[1]):
            tile[i, c] -= highest
    flat, scales = tile.reshape(-1), powers.reshape(-1)
    bits = scales.view(np.int32)
    for i in range(len(flat)):
        x = max(flat[i], np.float32(-87))
        k = np.rint(x * np.float32(1.44269504))
        x = x - k * np.float32(0.693359375) + k * np.float32(2.12194440e-4)
        y = np.float32(1.9875691500e-4)
        y = y * x + np.float32(1.3981999507e-3)
        y = y * x + np.float32(8.3334519073e-3)
        y = y * x + np.float32(4.1665795894e-2)
        y = y * x + np.float32(1.6666665459e-1)
        y = y * x + np.float32(5.0000001201e-1)
        flat[i] = y * x * x + x + np.float32(1)
        bits[i] = (np.int32(k) + np.int32(127)) << np.int32(23)  # the float32 2^k
    for i in range(len(flat)):
        y = flat[i] * scales[i]
        flat[i] = np.float32(0) if y < MIN_PROBABILITY else y
    for i in range(len(tile)):
        total = np.float32(0)
        for c in range(channels):
            total += tile[i, c]
        inverse = np.float32(1) / total
        for c in range(tile.shape[1]):
            tile[i, c] *= inverse


@njit(**JIT)
def mean_field(logits, points, weights, chains, size, iterations, lanes, posterior):
    """Run mean-field inference and write the result to `posterior` (C, N) float32.

    Args:
        logits: (N, blocks * lanes) float32, the negative energies; a large negative number at padding.
        points, weights: (N, entries), see `embed` and `normalize`.
        chains: see `link`.
        size: number of lattice points.
        lanes: see `load`.
    """
    channels, pixels = posterior.shape
    entries, width = points.shape[1], logits.shape[1]
    blocks = width // len(lanes)
    values, splatted = np.zeros((size, width), np.float32), np.zeros((size, width), np.float32)
    tile, powers = np.empty((TILE, width), np.float32), np.empty((TILE, width), np.float32)
    for iteration in range(iterations + 1):
        for start in range(0, pixels, TILE):
            length = min(TILE, pixels - start)
            for i in range(length):
                for block in range(blocks):
                    total = load(logits, (start + i) * blocks + block, lanes)
                    if iteration > 0:  # slice
                        for r in range(entries):
                            row = np.int64(points[start + i, r]) * blocks + block
                            total = madd(total, weights[start + i, r], load(values, row, lanes))
                    store(tile, i * blocks + block, total)
            _softmax(tile[:length], powers[:length], channels)
            for i in range(length):
                if iteration == iterations:
                    for c in range(channels):
                        posterior[c, start + i] = tile[i, c]
                    continue
                for block in range(blocks):  # splat
                    probabilities = load(tile, i * blocks + block, lanes)
                    for r in range(entries):
                        row = np.int64(points[start + i, r]) * blocks + block
                        total = madd(load(splatted, row, lanes), weights[start + i, r], probabilities)
                        store(splatted, row, total)
        if iteration < iterations:
            _blur(splatted, chains, lanes, blocks)
            values, splatted = splatted, values
            splatted[:] = 0


def infer(image: np.ndarray, energies: np.ndarray, kernels: list[Kernel], iterations: int) -> np.ndarray:
    """Return the class posteriors (C, H, W) float32 of one image.

    Args:
        image: (H, W, 3) uint8, see `refinement.presets.guide_image`.
        energies: (C, H, W) float32.
        kernels: see `refinement.presets.Preset.kernels`.
        iterations: mean-field iterations.

    Raises:
        ValueError: the image is too large for 32-bit numbers of lattice points; or see `lattice.packing`.
    """
    channels, height, width = energies.shape
    pixels = height * width
    entries = sum(len(kernel.widths) + 1 for kernel in kernels)
    if pixels * entries >= 2**31:
        raise ValueError(f"an image of {height} x {width} pixels is too large for the CRF: make it smaller")
    points, weights = np.empty((pixels, entries), np.int32), np.empty((pixels, entries), np.float32)
    chains, size, column = [], 0, 0
    for kernel in kernels:
        dimensions = len(kernel.widths)
        pack = packing(kernel.widths, height, width)
        widths = tuple(np.float32(w) for w in kernel.widths)
        # A copy, because numba compiles another version for read-only or non-contiguous arrays.
        guide = np.array(image[..., : dimensions - 2], order="C")
        keys = embed(guide, widths, pack.scale, pack.low, pack.strides, points, weights, column, size)
        chains.append(link(keys, np.argsort(keys), np.array(pack.jumps, np.int64), size))
        size += len(keys)
        stop = column + dimensions + 1
        normalize(points, weights, chains[-1], size, column, stop, kernel.alpha, kernel.compat)
        column = stop
    lanes = next((width for width in LANES if channels <= width), LANES[-1])
    logits = np.full((pixels, -(-channels // lanes) * lanes), -1e4, np.float32)
    logits[:, :channels] = -energies.reshape(channels, -1).T  # (N, C)
    posterior = np.empty((channels, pixels), np.float32)
    vector = (np.float32(0),) * lanes
    mean_field(logits, points, weights, np.concatenate(chains), size, iterations, vector, posterior)
    return posterior.reshape(channels, height, width)
