"""Model names -> checkpoint files, downloaded once into ~/.cache/clip, which other CLIP projects share."""
import hashlib
import math
import re
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from tqdm import tqdm

from foundation.files import replacing, sha256
from foundation.jsonfile import read_json
from foundation.logs import no_progress

# OpenAI's files; the folder name in each address is the sha256 of the file.
OPENAI = "https://openaipublic.azureedge.net/clip/models"
OPENAI_MODELS = {
    "RN50": "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762/RN50.pt",
    "RN101": "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599/RN101.pt",
    "RN50x4": "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd/RN50x4.pt",
    "RN50x16": "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa/RN50x16.pt",
    "RN50x64": "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c/RN50x64.pt",
    "ViT-B/32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
    "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt",
    "ViT-L/14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt",
    "ViT-L/14@336px": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02/ViT-L-14-336px.pt",
}
# Keys of open_clip configurations that describe OpenAI's architecture, and the required values of some keys.
# A configuration with another key or value describes an architecture that is not supported.
TOWER_KEYS = {
    "vision_cfg": {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio"},
    "text_cfg": {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"},
}
TOWER_VALUES = {"head_width": 64, "mlp_ratio": 4.0, "vocab_size": 49408}

TIMEOUT = 60  # seconds that a download waits for data


@dataclass(frozen=True)
class Source:
    """A checkpoint file, and the properties of the model that its weights do not determine."""

    file: Path
    open_clip: bool = False  # whether open_clip trained it
    conventions: dict[str, Any] = field(default_factory=dict)  # fields of `clip.model.Config`

    def weights_rounded(self, round_weights: bool | None) -> bool:
        """Return whether `clip.load(..., round_weights=...)` rounds the matrix weights of this file."""
        return not self.open_clip if round_weights is None else round_weights


def resolve(name: str) -> Source:
    """Return the checkpoint file of a model, downloaded if it is not in the cache.

    Args:
        name: a file; a name in `OPENAI_MODELS`; an open_clip "model:tag"; or "model:file", a checkpoint file
            with the architecture of the open_clip model "model".

    Raises:
        FileNotFoundError: the name is neither a file nor a known model.
        ValueError: the architecture of the open_clip model differs from OpenAI's CLIP.
        OSError: see `fetch`.
    """
    if Path(name).is_file():
        return _with_sidecar(Path(name))
    if name in OPENAI_MODELS:
        return Source(fetch(f"{OPENAI}/{OPENAI_MODELS[name]}", _cache()))
    model, colon, tag = name.partition(":")
    if colon:
        return _resolve_open_clip(model, tag)
    raise FileNotFoundError(
        f"no model {name!r}: give a checkpoint file, one of {', '.join(OPENAI_MODELS)}, "
        "or an open_clip model:tag such as ViT-B-16:laion2b_s34b_b88k"
    )


def _with_sidecar(file: Path) -> Source:
    """Return a checkpoint file, with the conventions of `open_clip_config.json` if it is next to the file."""
    sidecar = file.with_name("open_clip_config.json")
    if not sidecar.is_file():
        return Source(file)
    try:
        content = read_json(sidecar)
    except ValueError as error:
        raise ValueError(
            f"{sidecar} is not an open_clip configuration ({error}): correct or remove it"
        ) from None
    try:
        conventions = _conventions(content["model_cfg"], content.get("preprocess_cfg", {}), sidecar)
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{sidecar} is not an open_clip configuration: correct or remove it") from None
    return Source(file, True, conventions)


def _resolve_open_clip(model: str, tag: str) -> Source:
    import open_clip  # takes seconds to import

    config = open_clip.get_model_config(model)
    if config is None:
        raise FileNotFoundError(
            f"open_clip has no model {model!r} (requested {model}:{tag}): open_clip.list_models() lists them"
        )
    file = Path(tag)
    published = {} if file.is_file() else open_clip.pretrained.get_pretrained_cfg(model, tag)
    if not published and not file.is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model))
        raise FileNotFoundError(
            f"open_clip has no weights {tag!r} of {model}: give a checkpoint file or one of {tags}"
        )
    if published.get("quick_gelu"):
        config = {**config, "quick_gelu": True}
    conventions = _conventions(config, published, f"open_clip's {model}")
    if published.get("url"):
        file = fetch(published["url"], _cache())
    elif published:
        file = Path(open_clip.pretrained.download_pretrained(published, cache_dir=str(_cache())))
    return Source(file, True, conventions)


def _conventions(config: dict, preprocessing: dict, name: str | Path) -> dict[str, Any]:
    """Return the conventions of an open_clip configuration.

    Raises:
        ValueError: the architecture differs from OpenAI's CLIP, or a value is invalid.
    """
    for tower, known in TOWER_KEYS.items():
        for key, value in config[tower].items():
            if key not in known or value != TOWER_VALUES.get(key, value):
                raise ValueError(
                    f"{name} is not supported: its architecture differs from OpenAI's CLIP ({tower} sets "
                    f"{key} = {value}); use another model"
                )
    quick_gelu = config.get("quick_gelu") or False
    if not isinstance(quick_gelu, bool):
        raise ValueError(f"{name}: quick_gelu must be true or false, got {quick_gelu!r}")
    conventions = {"activation": "quick_gelu" if quick_gelu else "gelu"}
    for statistic, above in (("mean", -math.inf), ("std", 0)):
        if values := preprocessing.get(statistic):
            numbers = [value for value in values if isinstance(value, int | float) and value > above]
            if len(values) != 3 or len(numbers) != 3:
                expected = "three numbers" + (" above 0" if statistic == "std" else "")
                raise ValueError(f"{name}: {statistic} must be {expected}, got {values!s:.60}")
            conventions[statistic] = tuple(values)
    return conventions


def _cache() -> Path:
    try:
        return Path.home() / ".cache" / "clip"
    except RuntimeError:
        raise OSError("there is no home folder for the cache: set HOME, or give a checkpoint file") from None


def fetch(url: str, folder: Path) -> Path:
    """Return the path of a file in `folder`, downloaded if it is missing or has the wrong checksum.

    The checksum comes from the address: in OpenAI's addresses, the last folder is the sha256; in addresses
    of open_clip's releases, the file name ends in the first 8 digits of the sha256. Files at other addresses
    are not checked. A failed download leaves no file.

    Raises:
        OSError: the address cannot be reached, the file is incomplete, or its checksum is wrong.
    """
    name = url.rsplit("/", 1)[-1]
    target = folder / name
    candidates = [url.split("/")[-2], Path(name).stem.rsplit("-", 1)[-1]]
    checksum = next((text for text in candidates if re.fullmatch("[0-9a-f]{8}|[0-9a-f]{64}", text)), "")
    if target.is_file() and sha256(target).startswith(checksum):
        return target
    digest = hashlib.sha256()
    try:
        with urlopen(url, timeout=TIMEOUT) as response, replacing(target) as file:
            total = int(response.headers.get("Content-Length") or 0) or None
            with tqdm(total=total, unit="B", unit_scale=True, desc=name, disable=no_progress()) as bar:
                while chunk := response.read(1 << 20):
                    digest.update(chunk)
                    bar.update(file.write(chunk))
            if total and file.tell() != total:
                raise OSError(f"the download of {url} stopped at {file.tell()} of {total} bytes: try again")
            if not digest.hexdigest().startswith(checksum):
                raise OSError(
                    f"the download of {url} has the sha256 {digest.hexdigest()}, expected {checksum}: "
                    "try again"
                )
    except (URLError, HTTPException) as error:
        reason = getattr(error, "reason", type(error).__name__)
        raise OSError(
            f"cannot download {url} ({reason}): check the connection, or give a checkpoint file"
        ) from None
    return target
