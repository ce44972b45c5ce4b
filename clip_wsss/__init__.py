"""CLIP-WSSS in Python: masks from image-level labels, labels from CLIP alone, and trained networks.

    from clip_wsss import ClipES

    result = ClipES("ViT-B/16")("photo.jpg", ["cat", "sofa"])
    result.mask  # (H, W): 0 background, 1 cat, 2 sofa, 255 ignored

The scripts run on the same code and give the same masks.
"""

from clip_wsss.checks import check_packages

check_packages()

from clip_wsss.clip_es import ClipES  # noqa: E402
from clip_wsss.result import Result  # noqa: E402
from clip_wsss.segmenter import Segmenter  # noqa: E402
from clip_wsss.tag_clip import TagCLIP  # noqa: E402

__all__ = ["ClipES", "Result", "Segmenter", "TagCLIP"]
