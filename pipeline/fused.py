"""Steps 1 and 2b in one step: the same masks as the separate steps, without large files in between."""

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from foundation.files import below
from pipeline.cams import CamStep, store_files
from pipeline.decode import Decoder, LabeledImage
from pipeline.masks import MaskSettings, crf_labels, mask_values, resize_mask, shrunk_note
from pipeline.step import Step
from refinement.densecrf import densecrf_batch
from segmentation import camfile
from segmentation.benchmark import IGNORE
from segmentation.masks import encode_mask, is_complete, mask_class_ids


@dataclass
class FusedStep(Step):
    """Makes CAMs and masks. The torch backend of the dense CRF processes a whole batch on the device of the
    CAMs, in `compute`; the other backends process one image at a time, in `write`.

    Attributes:
        cams: how CAMs are made, and where they are written; format "none" writes none.
        masks: how masks are made from them; `crf_backend` must be resolved, not "auto".
        output: folder of the masks; None passes them to `cams.store`.
    """

    cams: CamStep
    masks: MaskSettings
    output: str | None

    def __post_init__(self):
        self.flow, self.benchmark = self.cams.flow, self.cams.benchmark
        self.cam_type = self.cams.settings.cam_type

    def is_done(self, name: str) -> bool:
        """Return whether a mask of the image's current labels exists, and the CAM file if CAMs are kept."""
        file = below(self.output, f"{name}.png")
        if not is_complete(file):
            return False
        try:
            if mask_class_ids(file) not in (None, self.cams.labels(name)):
                return False
        except (ValueError, OSError):
            return False  # for unreadable labels, the decoder raises the error
        return self.cams.output is None or self.cams.is_done(name)

    def start(self, worker_index: int) -> None:
        self.cams.start(worker_index)
        self.flow, self.device = self.cams.flow, self.cams.clip.device

    def decoder(self) -> Decoder:
        decoder = self.cams.decoder(self.masks.crf_max_pixels)
        masks = ((self.output, ".png"),) if self.output else ()
        return replace(decoder, stale=(*decoder.stale, *masks))

    def batch_size(self, decoded: LabeledImage) -> int:
        return self.cams.batch_size(decoded)

    def compute(self, batch: list[LabeledImage]) -> list[tuple[dict[str, np.ndarray], np.ndarray | None]]:
        """Return for each image CAM type -> (K, h, w), and the mask (H, W) if the backend is torch."""
        cams = self.cams.compute(batch)
        masks = [None] * len(batch)
        if self.masks.crf_backend == "torch":
            masks = self._crf(batch, [by_type[self.cam_type] for by_type in cams])
        return list(zip(cams, masks, strict=True))

    @torch.no_grad()
    def _crf(self, batch: list[LabeledImage], grids: list[np.ndarray]) -> list[np.ndarray]:
        """Return the masks of a batch, (H, W) uint8 at the size of the kept images."""
        dtype = getattr(torch, self.masks.crf.unary_type)
        images, probabilities, masks = [], [], []
        for decoded, grid in zip(batch, grids, strict=True):
            cams = upsample(torch.from_numpy(grid).to(self.device), decoded.image.shape[:2]).to(dtype)
            if self.benchmark.has_background:
                cams = torch.cat([(1 - cams.amax(0, keepdim=True).float()).to(dtype), cams])
            probabilities.append(cams)  # as in `pipeline.masks.crf_posterior`
            images.append(torch.tensor(decoded.image, device=self.device))
        posteriors = densecrf_batch(images, probabilities, self.masks.crf, "torch", self.device)
        for decoded, posterior in zip(batch, posteriors, strict=True):
            highest, channel = posterior.max(0)  # (H, W)
            values = torch.from_numpy(mask_values(decoded.class_ids, self.benchmark)).to(self.device)
            masks.append(values[channel].masked_fill(highest < self.masks.confidence, IGNORE))
        return [mask.cpu().numpy() for mask in masks]

    def write(
        self, decoded: LabeledImage, result: tuple[dict[str, np.ndarray], np.ndarray | None]
    ) -> list[str]:
        cams, labels = result
        size = decoded.image.shape[:2]
        if labels is None:
            full = camfile.resize(cams[self.cam_type], size).astype(np.float16)
            values = mask_values(decoded.class_ids, self.benchmark)
            labels = crf_labels(decoded.image, full, values, self.masks)
        mask = encode_mask(resize_mask(labels, decoded.size), self.benchmark.palette, decoded.class_ids)
        files = self.cams.files(decoded, cams)
        if self.output is None:
            self.cams.save(decoded.name, {**files, ".png": mask})
        else:  # the mask last: if it exists, `is_done` can rely on the other files
            self.cams.save(decoded.name, files)
            store_files(self.output, decoded.name, {".png": mask})
        notes = decoded.notes + self.cams.notes(cams)
        return notes if size == decoded.size else [*notes, shrunk_note(self.masks)]


def upsample(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """Return CAMs (K, h, w) resized to (K, H, W) float16 on their device, as `segmentation.camfile` resizes
    them on a CPU."""
    return F.interpolate(grid[None], size, mode="bilinear", align_corners=False)[0].half()
