"""Compiled blocks of the image tower give the same results as plain blocks."""
import os
import shutil

import pytest
import torch

import clip
from pytorch_grad_cam import text_cams
from tests.clip.test_checkpoint import SMALL_VIT, small_state

COMPILER = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")


@pytest.mark.skipif(COMPILER is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_and_plain_blocks_agree(tmp_path):
    """Compares fused attention, attention with weights, and gradients; the state dict keeps its keys."""
    torch.save(small_state(SMALL_VIT), tmp_path / "model.pt")
    plain, compiled = (clip.load(tmp_path / "model.pt", "cpu", compile=compile) for compile in (False, True))
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    compiled.forget_text_tower()
    images, text_features = torch.randn(1, 3, 32, 24), torch.eye(32)[None, :2]
    tokens, _ = plain.visual.embed(images)
    with torch.no_grad():
        fused = [[block for block, _ in model.visual.blocks(tokens)] for model in (plain, compiled)]
    for one, other in zip(*fused, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    for method in ("gradcam", "layercam"):
        one, other = (
            text_cams(model, images, text_features, torch.eye(32)[2:5], method=method)
            for model in (plain, compiled)
        )
        torch.testing.assert_close(one.cams, other.cams, rtol=0, atol=1e-4)
        torch.testing.assert_close(one.affinity, other.affinity, rtol=0, atol=1e-6)
