"""TagCLIP: image-level labels from a frozen CLIP, without annotation (Lin et al., AAAI 2024)."""

from tagclip.config import TagSettings
from tagclip.model import Tagger, Tags, tag_images

__all__ = ["TagSettings", "Tagger", "Tags", "tag_images"]
