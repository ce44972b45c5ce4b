"""Text -> token ids: the byte-level byte-pair encoding that CLIP was trained with.

The merge table (Radford et al., ICML 2021; sha256 924691ac...4804a) is the one the open_clip_torch
package ships; that package is located, not imported, since importing it takes seconds.
"""
import gzip
import html
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import ftfy
import regex
import torch
from torch import Tensor

MERGES = 48894  # lines 1.. of the table; with 2 x 256 byte symbols and 2 special tokens: 49408 ids
START, END = "<|startoftext|>", "<|endoftext|>"
PIECES = regex.compile(
    rf"{regex.escape(START)}|{regex.escape(END)}|'s|'t|'re|'ve|'m|'ll|'d|\p{{L}}+|\p{{N}}|[^\s\p{{L}}\p{{N}}]+",
    regex.IGNORECASE,
)


@cache
def byte_symbols() -> dict[int, str]:
    """Byte -> one visible character: printable bytes stand for themselves and come first, the
    other 68 follow as code points from 256. The order fixes the first 256 ids."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in symbols:
            symbols[byte] = chr(256 + len(symbols) - len(printable))
    return symbols


@cache
def vocabulary() -> tuple[dict[tuple[str, str], int], dict[str, int]]:
    """The rank of every merge (lower merges first), and the id of every token."""
    spec = find_spec("open_clip")
    if spec is None:
        raise FileNotFoundError("the tokenizer needs the merge table of open_clip_torch: pip install it")
    with gzip.open(Path(spec.origin).with_name("bpe_simple_vocab_16e6.txt.gz"), "rt", "utf-8") as table:
        lines = table.read().split("\n")[1 : MERGES + 1]  # line 0 is a header
    merges = [tuple(line.split()) for line in lines]
    symbols = list(byte_symbols().values())
    tokens = [*symbols, *(s + "</w>" for s in symbols), *map("".join, merges), START, END]
    return {pair: rank for rank, pair in enumerate(merges)}, {token: i for i, token in enumerate(tokens)}


@cache
def piece_ids(piece: str) -> tuple[int, ...]:
    """Ids of one piece of lower-case text: its bytes, merged pair by pair, lowest rank first."""
    ranks, ids = vocabulary()
    if piece in (START, END):
        return (ids[piece],)
    symbols = [byte_symbols()[byte] for byte in piece.encode("utf-8")]
    symbols[-1] += "</w>"
    while len(symbols) > 1:
        best = min(pairwise(symbols), key=lambda pair: ranks.get(pair, MERGES))
        if best not in ranks:
            break
        merged, i = [], 0
        while i < len(symbols):
            if tuple(symbols[i : i + 2]) == best:
                merged.append(symbols[i] + symbols[i + 1])
                i += 2
            else:
                merged.append(symbols[i])
                i += 1
        symbols = merged
    return tuple(ids[symbol] for symbol in symbols)


def clean(text: str) -> str:
    """Mend broken unicode, unescape HTML (twice, as web captions need), fold white space, lower."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def tokenize(texts: str | list[str], context_length: int = 77, truncate: bool = False) -> Tensor:
    """Encode texts as CLIP reads them.

    Args:
        texts: one text or several.
        context_length: ids per text; 77 for every published CLIP.
        truncate: cut a longer text and end it with the end token, instead of raising.

    Returns:
        (N, context_length) int32: start token, ids, end token, zeros.

    Raises:
        ValueError: a text is too long and `truncate` is off.
    """
    texts = [texts] if isinstance(texts, str) else texts
    _, ids = vocabulary()
    result = torch.zeros(len(texts), context_length, dtype=torch.int32)
    for row, text in zip(result, texts, strict=True):
        pieces = PIECES.findall(clean(text))
        tokens = [ids[START], *(i for piece in pieces for i in piece_ids(piece)), ids[END]]
        if len(tokens) > context_length:
            if not truncate:
                raise ValueError(
                    f"text has {len(tokens)} tokens, more than the context of {context_length}: {text!r}"
                )
            tokens = [*tokens[: context_length - 1], ids[END]]
        row[: len(tokens)] = torch.tensor(tokens)
    return result
