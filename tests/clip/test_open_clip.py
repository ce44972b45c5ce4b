"""The towers against open_clip's implementation with the same weights.

This is an independent check of parts that no golden vectors cover: ResNet towers and GELU.
"""
import pytest
import torch

import clip


@pytest.mark.parametrize("layers", [2, [1, 2, 1, 1]], ids=["vit", "resnet"])
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_features_equal_open_clip(layers, quick_gelu):
    open_clip = pytest.importorskip("open_clip.model")
    torch.manual_seed(0)
    theirs = open_clip.CLIP(
        embed_dim=32,
        vision_cfg=open_clip.CLIPVisionCfg(layers=layers, width=64, patch_size=8, image_size=64),
        text_cfg=open_clip.CLIPTextCfg(context_length=77, vocab_size=49408, width=64, heads=1, layers=2),
        quick_gelu=quick_gelu,
    ).eval()
    for module in theirs.modules():  # the initial statistics, 0 and 1, would hide errors
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            torch.nn.init.normal_(module.weight, 1, 0.1)
    state = clip.checkpoint.clean_keys(theirs.state_dict())
    ours = clip.checkpoint.from_state_dict(state, activation="quick_gelu" if quick_gelu else "gelu").eval()
    images, tokens = torch.randn(2, 3, 64, 64), clip.tokenize(["a red fox", "snow"]).long()
    with torch.no_grad():
        torch.testing.assert_close(ours.encode_text(tokens), theirs.encode_text(tokens))
        if isinstance(layers, int):
            features = ours.visual(images, position_rounding="never")
            torch.testing.assert_close(features, theirs.encode_image(images), rtol=1e-4, atol=1e-5)
        else:
            exact, rounded = (ours.visual(images, rounding) for rounding in ("never", "always"))
            torch.testing.assert_close(exact, theirs.encode_image(images), rtol=1e-4, atol=1e-5)
            assert torch.equal(ours.visual(images, "resampled"), exact)  # the grid is the trained one
            table = theirs.visual.attnpool.positional_embedding
            table.data = table.data.half().float()
            torch.testing.assert_close(rounded, theirs.encode_image(images), rtol=1e-4, atol=1e-5)
            assert not torch.equal(rounded, exact)
