"""Class names in annotations of other tools, matched to the classes of a benchmark."""

import unicodedata
from collections.abc import Sequence


def find_class(name: str, classes: Sequence[str]) -> int | None:
    """Return the index of the class with this name; None if there is no such class, or more than one.

    An exact match has priority. Otherwise case does not matter, and `_` and `-` count as blanks.
    """
    name = name.strip()
    if name in classes:
        return classes.index(name)
    matches = [index for index, other in enumerate(classes) if _key(other) == _key(name)]
    return matches[0] if len(matches) == 1 else None


def _key(name: str) -> str:
    words = unicodedata.normalize("NFC", name).replace("_", " ").replace("-", " ").split()
    return " ".join(words).casefold()
