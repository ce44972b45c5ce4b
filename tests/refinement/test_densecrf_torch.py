"""Parts of the torch backend: energies, guide image, lattice, groups of images."""

import math
from dataclasses import replace

import numpy as np
import torch

from refinement import densecrf_torch
from refinement.densecrf_torch import RUN, _filter, _groups, _guide_image, _lattice, _runs, _unary
from refinement.lattice import Kernel, packing
from refinement.presets import IMAGE_MODES, PRESETS, guide_image, unary

CLIP_ES = PRESETS["clip_es"]


def test_energies_equal_numpy_for_every_float16_probability():
    halves = np.arange(0x3C01, dtype=np.uint16).view(np.float16)[:, None, None]  # all numbers from 0 to 1
    np.testing.assert_array_equal(_unary(torch.from_numpy(halves), CLIP_ES), unary(halves, CLIP_ES))
    single = halves.astype(np.float32)
    np.testing.assert_array_equal(_unary(torch.from_numpy(single), CLIP_ES), unary(single, CLIP_ES))
    unrounded = replace(CLIP_ES, unary_type="float32")
    np.testing.assert_allclose(
        _unary(torch.from_numpy(halves), unrounded), unary(halves, unrounded), rtol=1e-6, atol=1e-7
    )


def test_guide_image_equals_the_numpy_version():
    levels = np.arange(256 * 3, dtype=np.uint32).reshape(16, 16, 3).astype(np.uint8)
    for mode in IMAGE_MODES:
        preset = replace(CLIP_ES, image_mode=mode)
        on_device = _guide_image(torch.from_numpy(levels), preset)
        np.testing.assert_array_equal(on_device, guide_image(levels, preset))


def test_runs_sum_the_entries_of_each_point():
    counts = torch.tensor([1, RUN, RUN + 1, 3 * RUN**2, 2])
    point = torch.repeat_interleave(torch.arange(5, dtype=torch.int32), counts)
    values = torch.ones(len(point))
    runs = _runs(point, 5)
    assert len(runs) == 3  # 3 * RUN^2 entries of one point need three levels of sums
    for starts in runs:
        ends = torch.cat([starts[1:], torch.tensor([len(values)])])
        assert (ends - starts).max() <= RUN
        sums = torch.cat([torch.zeros(1), values.cumsum(0)])
        values = sums[ends.long()] - sums[starts.long()]
    assert values.tolist() == counts.tolist()


def test_images_in_a_shared_lattice_do_not_affect_each_other():
    features = torch.rand(5, 60, generator=torch.Generator().manual_seed(0))
    pack = packing((67, 67, 3, 3, 3), 60, 60)
    image = torch.arange(2).repeat_interleave(60)
    lattice = _lattice(features.repeat(1, 2), image, Kernel((67, 67, 3, 3, 3), 4.0), pack)
    matrix = _filter(lattice, torch.eye(120))
    assert (matrix[:60, 60:] == 0).all() and (matrix[60:, :60] == 0).all()
    torch.testing.assert_close(matrix[:60, :60], matrix[60:, 60:])
    assert (matrix[:60, :60] > 0).float().mean() > 0.9  # nearby pixels of one image affect each other


def test_groups_are_limited_by_pixels_and_by_keys(monkeypatch):
    sizes = [(10, 20), (20, 10), (30, 30), (1, 1), (5, 5)]
    monkeypatch.setattr(densecrf_torch, "GROUP_PIXELS", 450)
    assert list(_groups(sizes, CLIP_ES.kernels())) == [[0, 1], [2], [3, 4]]
    monkeypatch.setattr(densecrf_torch, "GROUP_PIXELS", 2**22)
    assert list(_groups(sizes, CLIP_ES.kernels())) == [[0, 1, 2, 3, 4]]
    narrow = replace(CLIP_ES, bilateral_srgb=0.24).kernels()
    bits = math.log2(packing(narrow[1].widths, 30, 30).keys)
    assert 60 < bits < 62
    assert max(map(len, _groups(sizes, narrow))) <= 2 ** (62 - bits)
