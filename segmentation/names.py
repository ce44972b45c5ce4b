"""Image names (ids): the check that every list of images passes, before names become parts of paths.

A name is the path of an image file below the image folder, without suffix: `x` or `folder/x`. Names come from
split files, annotations, file names and tar shards, which can be damaged or made by others.
"""

import re

NAMES = "image names go without suffix and are relative to the image folder, such as `x` or `folder/x`"
MAX_BYTES = 240  # of one part of a name; file systems allow 255, of which outputs need some for their suffix
MAX_TOTAL = 1000  # bytes of a whole name; systems allow 4096 for a path
# Control characters, line separators, byte order marks, and surrogates, which stand for bytes that are not
# UTF-8. Tab and line feed also separate the fields of lists.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ufeff\ud800-\udfff]")
SUFFIX = re.compile(r"\.(jpe?g|png|bmp|gif|tiff?|webp|xml|npy|npz)$", re.IGNORECASE)
OUTSIDE = re.compile(r"/|[A-Za-z]:|\w+://")  # start of an absolute path, of a Windows drive, or of a URL
COMMAS = re.compile(r"[,;]\d*([,;]\d*)*$")  # `x,0`: class indices after commas
# Windows opens devices under these names, with any suffix.
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.[^/]*)?", re.IGNORECASE)


def image_name(text: str) -> str:
    r"""Return an image name with `/` between folders, also for `folder\x` and `./x`.

    Raises:
        ValueError: not a name that is safe to use in paths; the message says why, without the line.
    """
    path = text.replace("\\", "/")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if fault := _fault(path, parts):
        raise ValueError(f"image name {shortened(text)} {fault}")
    return "/".join(parts)


def check_listable(name: str) -> None:
    """Raise ValueError if a split file cannot contain a name, which comes from an image file."""
    blank = len(name.split()) != 1
    if image_name(name) != name or blank:
        what = "blank" if blank else "backslash"
        raise ValueError(f"image name {shortened(name)} contains a {what}: rename the image")


def shortened(text: object) -> str:
    """Return the start of a text in quotes, for messages; characters that cannot be printed are escaped."""
    shown = repr(text)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def _fault(path: str, parts: list[str]) -> str:
    """Return why a path with these parts is not an image name; empty if it is one."""
    if UNPRINTABLE.search(path):
        return "contains a control character, or bytes that are not UTF-8: rename the image"
    if not parts:
        return f"is empty: {NAMES}"
    if OUTSIDE.match(path):
        return f"is an absolute path: {NAMES}"
    if ".." in parts:
        return f"contains `..`: {NAMES}"
    if match := SUFFIX.search(parts[-1]):
        return f"has the suffix {match[0]}: {NAMES}"
    if COMMAS.search(parts[-1]):
        return f"ends in a comma or in numbers after one: separate fields by blanks; {NAMES}"
    if any(map(RESERVED.fullmatch, parts)):
        return "is reserved by Windows: rename the image"
    encoded = path.encode()
    if len(encoded) > MAX_TOTAL or max(len(part.encode()) for part in parts) > MAX_BYTES:
        return f"is too long (more than {MAX_BYTES} bytes): rename the image"
    return ""
