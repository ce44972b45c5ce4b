"""Write CAM files for tests."""
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from segmentation import camfile


def write_cams(
    folder: Path,
    name: str,
    class_ids: Sequence[int] | np.ndarray,
    cams: Mapping[str, np.ndarray],
    size: tuple[int, int],
    format: str = "full",
) -> Path:
    """Write the CAM file of one image and return its path; see `segmentation.camfile.encode`."""
    content = camfile.encode(class_ids, cams, size, format)
    file = folder / f"{name}{camfile.FORMATS[format]}"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file
