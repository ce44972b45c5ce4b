"""Text -> token ids by CLIP's byte-level byte-pair encoding (Radford et al., ICML 2021).

The encoder and its merge table come from the open_clip_torch package.
"""
from functools import cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import regex
import torch
from torch import Tensor

SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>")
PIECES = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


def open_clip_file(name: str) -> ModuleType:
    """Return a module of open_clip, loaded from its file, because importing the package takes seconds.

    Raises:
        FileNotFoundError: open_clip_torch is not installed.
    """
    package = find_spec("open_clip")
    if package is None:
        raise FileNotFoundError(
            "the tokenizer and prompt templates require open_clip: pip install open_clip_torch"
        )
    spec = spec_from_file_location(f"open_clip_{name}", Path(package.origin).with_name(f"{name}.py"))
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def encoder():
    """Return open_clip's tokenizer; its `encode(text)` returns ids without the start and end tokens."""
    tokenizer = open_clip_file("tokenizer").SimpleTokenizer()
    # open_clip renamed the special tokens. OpenAI's names are restored, so that texts that contain them get
    # OpenAI's ids.
    names = dict(zip(SPECIAL_TOKENS, tokenizer.all_special_ids, strict=True))
    tokenizer.encoder |= names
    tokenizer.cache = {name: name for name in names}
    special = "|".join(map(regex.escape, names))
    tokenizer.pat = regex.compile(f"{special}|{PIECES}", regex.IGNORECASE)
    return tokenizer


def tokenize(texts: str | list[str], context_length: int = 77, truncate: bool = False) -> Tensor:
    """Return token ids (N, context_length) int32 of texts: start token, ids, end token, zeros.

    Args:
        texts: one text, or a list.
        context_length: ids per text; 77 for every published CLIP.
        truncate: cut texts that are too long; the last id is then the end token.

    Raises:
        ValueError: a text is too long, and `truncate` is False.
    """
    texts = [texts] if isinstance(texts, str) else texts
    start, end = encoder().all_special_ids
    result = torch.zeros(len(texts), context_length, dtype=torch.int32)
    for row, text in zip(result, texts, strict=True):
        tokens = [start, *encoder().encode(text), end]
        if len(tokens) > context_length:
            if not truncate:
                raise ValueError(
                    f"text {text!r} has {len(tokens)} tokens, the maximum is {context_length}: shorten it"
                )
            tokens = [*tokens[: context_length - 1], end]
        row[: len(tokens)] = torch.tensor(tokens)
    return result
