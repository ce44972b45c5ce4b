"""Steps 1 and 2b in one go: images and labels -> pseudo masks, nothing large on the disk between.

Every stage is that of the steps, so the masks are theirs.
"""

from collections.abc import Generator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.cams import INITIAL, REFINED, CamJob, CamSettings, CamStep, Store, is_made, store_files
from pipeline.decode import Decoder, Labelled
from pipeline.flow import flow
from pipeline.masks import MaskJob, at_size, mask_values, refine_labels, shrunk_note
from pipeline.processes import Outcome
from refinement.densecrf import densecrf_batch
from segmentation import camfile
from segmentation.benchmark import IGNORE
from segmentation.masks import encode_mask, mask_keys

Maps = dict[str, np.ndarray]


def generate(
    names: Sequence[str], position: int, cams: CamJob, masks: MaskJob
) -> Generator[Outcome, None, None]:
    """Make the masks of `names` that are not there yet; see `pipeline.processes`.

    Args:
        names: image ids.
        position: of this process.
        cams: how CAMs are made, and where they are kept; nowhere with format "none", and no `output` then.
        masks: how masks are made of them; their folders of CAMs and images are not used.
    """
    missing = []
    for name in names:
        if _is_made(cams, masks, name):
            yield Outcome(name)
        else:
            missing.append(name)
    if missing:  # otherwise no model is needed
        step = FusedStep(cams, masks, position, partial(_store, cams, masks))
        yield from flow(missing, step.decoder(), step, step.flow)


def _is_made(cams: CamJob, masks: MaskJob, name: str) -> bool:
    """Is there a mask of the labels that the image has now, and a CAM file if it is kept?"""
    file = Path(masks.output) / f"{name}.png"
    if not file.is_file():
        return False
    try:
        if mask_keys(file) not in (None, cams.labels(name)):
            return False
    except (ValueError, OSError):
        return False  # labels that cannot be read fail when they are needed
    return cams.output is None or is_made(cams, name)


def _store(cams: CamJob, masks: MaskJob, name: str, files: dict[str, bytes]) -> None:
    for suffix, content in files.items():  # the mask last: where it is all is done
        store_files(masks.output if suffix == ".png" else cams.output, name, {suffix: content})


class FusedStep:
    """CAMs and masks with one model, see `pipeline.flow.Step`.

    On a CPU the dense CRF runs where the mask is written, on a GPU (or with the torch backend) for the
    whole batch where the CAMs are.

    Args:
        cams, masks: see `generate`.
        position: of this process.
        store: where files go.
    """

    def __init__(self, cams: CamJob, masks: MaskJob, position: int, store: Store):
        self.cams = CamStep(cams, position)
        self.masks, self.store = masks, store
        self.cam_type = cam_type(cams.settings)
        self.batch_size = self.cams.batch_size
        self.device, self.flow = self.cams.model.device, self.cams.flow

    def decoder(self) -> Decoder:
        decoder = self.cams.decoder(self.masks.max_pixels)
        return replace(decoder, stale=(*decoder.stale, (self.masks.output, ".png")))

    def compute(self, batch: list[Labelled]) -> list[tuple[Maps, np.ndarray | None]]:
        """CAM type -> maps on the patch grid, and the mask where the CRF runs on the device."""
        maps = self.cams.compute(batch)
        labels = [None] * len(batch)
        if self.masks.backend == "torch":
            labels = self._crf(batch, [image_maps[self.cam_type] for image_maps in maps])
        return list(zip(maps, labels, strict=True))

    @torch.no_grad()
    def _crf(self, batch: list[Labelled], grids: list[np.ndarray]) -> list[np.ndarray]:
        """The masks of a batch: (H, W) uint8, at the size of the kept images."""
        images = [torch.tensor(decoded.image, device=self.device) for decoded in batch]
        probabilities = [
            self._probabilities(torch.from_numpy(grid).to(self.device), image.shape[:2])
            for grid, image in zip(grids, images, strict=True)
        ]
        posteriors = densecrf_batch(images, probabilities, self.masks.crf, "torch", self.device)
        labels = []
        for decoded, posterior in zip(batch, posteriors, strict=True):
            top, best = posterior.max(0)  # (H, W)
            values = torch.from_numpy(mask_values(np.array(decoded.keys), self.masks)).to(self.device)
            labels.append(values[best].masked_fill(top < self.masks.confidence, IGNORE))
        return [mask.cpu().numpy() for mask in labels]

    def _probabilities(self, grid: Tensor, size: tuple[int, int]) -> Tensor:
        """(K, h, w) -> (C, H, W), as `pipeline.masks.refine_labels` has them."""
        dtype = getattr(torch, self.masks.crf.unary_type)
        maps = upsample(grid, size).to(dtype)
        if not self.masks.benchmark.has_background:
            return maps
        return torch.cat([(1 - maps.amax(0, keepdim=True).float()).to(dtype), maps])

    def write(self, decoded: Labelled, result: tuple[Maps, np.ndarray | None]) -> list[str]:
        maps, labels = result
        small = decoded.image.shape[:2]
        if labels is None:
            grid = camfile.resize(maps[self.cam_type], small).astype(np.float16)
            labels, posterior = refine_labels(decoded.image, np.array(decoded.keys), grid, self.masks)
            labels[posterior < self.masks.confidence] = IGNORE
        mask = encode_mask(at_size(labels, decoded.size), self.masks.benchmark.palette, decoded.keys)
        kept = {} if self.cams.job.format == "none" else self.cams.files(decoded, maps)
        self.store(decoded.name, {**kept, ".png": mask})
        notes = decoded.notes + self.cams.notes(maps)
        return notes if small == decoded.size else [*notes, shrunk_note(self.masks)]


def cam_type(settings: CamSettings) -> str:
    """The maps that masks are made of."""
    return INITIAL if settings.refine == "none" else REFINED


def upsample(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """CAMs (K, h, w) -> (K, H, W) float16 on their device, as `segmentation.camfile` does on a CPU."""
    return F.interpolate(grid[None], size, mode="bilinear", align_corners=False)[0].half()
