"""Model names -> checkpoint files, downloaded once into the cache that CLIP's users already have."""
import json
import os
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import URLError

from tqdm import tqdm

from common.files import sha256

# The released files; the folder in each address is the sha256 of the file.
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


# What an open_clip configuration may say of towers that are CLIP's own; anything else is another model.
TOWER_KEYS = {
    "vision_cfg": {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio"},
    "text_cfg": {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"},
}
TOWER_VALUES = {"head_width": 64, "mlp_ratio": 4.0, "vocab_size": 49408}


@dataclass(frozen=True)
class Source:
    """A checkpoint on disk, and what its weights do not show.

    Attributes:
        file: the checkpoint.
        open_clip: whether open_clip trained it.
        conventions: fields of `clip.model.Config` that differ from OpenAI's.
    """

    file: Path
    open_clip: bool = False
    conventions: dict[str, Any] = field(default_factory=dict)


def model_cache() -> Path:
    return Path.home() / ".cache" / "clip"


def resolve(name: str) -> Source:
    """Find the file of a model, downloading it if it has a public name.

    Args:
        name: a file; an OpenAI name (`OPENAI_MODELS`); "model:tag" or "model:file" with a model
            name of open_clip.

    Raises:
        FileNotFoundError: neither a file nor a known name.
        ValueError: open_clip's model is not one this project can run.
        OSError: the download failed or does not have the published checksum.
    """
    if Path(name).is_file():
        return _with_sidecar(Path(name))
    if name in OPENAI_MODELS:
        return Source(fetch(f"{OPENAI}/{OPENAI_MODELS[name]}", model_cache()))
    model, colon, tag = name.partition(":")
    if colon:
        return _resolve_open_clip(model, tag)
    raise FileNotFoundError(
        f"no model {name!r}: give a checkpoint file, one of {', '.join(OPENAI_MODELS)}, "
        "or an open_clip model:tag such as ViT-B-16:laion2b_s34b_b88k"
    )


def _with_sidecar(file: Path) -> Source:
    """A file, with the `open_clip_config.json` beside it if model hubs' layout was kept."""
    sidecar = file.with_name("open_clip_config.json")
    if not sidecar.is_file():
        return Source(file)
    try:
        content = json.loads(sidecar.read_text())
        preprocessing = content.get("preprocess_cfg", {})
        return Source(file, True, _conventions(content["model_cfg"], preprocessing, sidecar))
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{sidecar} is not a configuration of open_clip: mend or remove it") from None


def _resolve_open_clip(model: str, tag: str) -> Source:
    import open_clip  # seconds to import, so only for those who ask for its models

    config = open_clip.get_model_config(model)
    if config is None:
        raise FileNotFoundError(f"open_clip knows no model {model!r} (asked for {model}:{tag})")
    name = f"open_clip's {model}"
    if Path(tag).is_file():
        return Source(Path(tag), True, _conventions(config, {}, name))
    published = open_clip.pretrained.get_pretrained_cfg(model, tag)
    if not published:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model))
        raise FileNotFoundError(f"open_clip has no weights {tag!r} of {model}; it has {tags}")
    if published.get("quick_gelu"):
        config = {**config, "quick_gelu": True}
    conventions = _conventions(config, published, name)
    if published.get("url"):
        return Source(fetch(published["url"], model_cache()), True, conventions)
    file = open_clip.pretrained.download_pretrained(published, cache_dir=str(model_cache()))
    return Source(Path(file), True, conventions)


def _conventions(config: dict, preprocessing: dict, name: str | Path) -> dict[str, Any]:
    """Read the conventions off open_clip's configuration of a model.

    Raises:
        ValueError: the model is not built from CLIP's own towers.
    """
    for tower, known in TOWER_KEYS.items():
        for key, value in config[tower].items():
            if key not in known or value != TOWER_VALUES.get(key, value):
                raise ValueError(
                    f"{name} is not built from CLIP's own towers ({tower} says {key} = {value}), so it "
                    "cannot be run here"
                )
    conventions = {"activation": "quick_gelu" if config.get("quick_gelu") else "gelu"}
    for statistic in ("mean", "std"):
        if preprocessing.get(statistic):
            conventions[statistic] = tuple(preprocessing[statistic])
    return conventions


def fetch(url: str, folder: Path) -> Path:
    """Download a file once, checking the sha256 that its address carries.

    OpenAI's addresses carry it as the last folder, open_clip's releases as a prefix of it at the
    end of the file name; other addresses carry none. A download that is cut short leaves nothing.

    Raises:
        OSError: the address cannot be reached, or what came back has another checksum.
    """
    name = url.rsplit("/", 1)[-1]
    target = folder / name
    published = [url.split("/")[-2], Path(name).stem.rsplit("-", 1)[-1]]
    checksum = next((part for part in published if _is_checksum(part)), "")
    if target.is_file() and sha256(target).startswith(checksum):
        return target
    folder.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{name}.{os.getpid()}")
    try:
        with urllib.request.urlopen(url) as response, open(partial, "wb") as file:
            total = int(response.headers.get("Content-Length") or 0) or None
            with tqdm(total=total, unit="B", unit_scale=True, desc=name, disable=None) as bar:
                while chunk := response.read(1 << 20):
                    bar.update(file.write(chunk))
        if total and partial.stat().st_size != total:
            raise OSError(f"the download of {url} stopped at {partial.stat().st_size} of {total} bytes")
        if not sha256(partial).startswith(checksum):
            raise OSError(f"what {url} sent has another sha256 than the published one, {checksum}")
        partial.replace(target)
    except URLError as error:
        raise OSError(f"cannot download {url}: {error.reason}") from None
    finally:
        partial.unlink(missing_ok=True)
    return target


def _is_checksum(text: str) -> bool:
    return len(text) in (8, 64) and all(c in "0123456789abcdef" for c in text)
