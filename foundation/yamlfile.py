"""Read YAML by the fields of a dataclass: values as they are written, and errors with file, line and field.

YAML derives the type of a value from its text: `no` is false, `1e3` is text and `12:30` is 750. Here the type
of the field decides: text is read as written, and only numbers and booleans are interpreted.

Files can come from untrusted sources, so tags, anchors and aliases are errors, and size and depth are
limited.
"""

import re
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from foundation.settings import SPEC, Spec, type_of

MAX_BYTES = 2**20
MAX_VALUES = 10_000  # a benchmark has at most 255 classes
MAX_DEPTH = 20
SHOWN = 60  # characters of a value in an error
NULLS = ("", "~", "null", "Null", "NULL")
BOOLEANS = {
    **dict.fromkeys(("true", "yes", "on", "y", "1"), True),
    **dict.fromkeys(("false", "no", "off", "n", "0"), False),
}
INTEGER = re.compile(r"[-+]?[0-9]\w*", re.ASCII)
FLOAT = re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?")
BREAK = re.compile("\r\n|[\r\n\x85\u2028\u2029]")  # line breaks of YAML


@dataclass(frozen=True)
class Entry:
    """A value of a file or of a word `key=value`.

    Attributes:
        value: has the type of the field; text with a reference such as `${data.root}` is unchanged.
        where: start of errors about the value, such as "configuration c.yaml, line 3".
        items: the same for each item of a list.
    """

    value: Any
    where: str
    items: Sequence[str] = ()


Schema = dict[str, tuple[Any, Spec]]
Where = Callable[[yaml.Node], str]


def read(cls: type, file: str | Path, kind: str, references: bool = False) -> dict[str, Entry]:
    """Return the values that a YAML file sets: key of the field -> value.

    The key of a field `rates` in a section `model` (a field that is a dataclass) is "model.rates".

    Args:
        cls: dataclass whose fields the file may set.
        kind: what the file is, for errors, such as "configuration".
        references: return text that contains `${` unchanged, whatever the type of the field.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not YAML, a field is unknown or set twice, or a value has the wrong type or is
            outside its range.
    """
    source = f"{kind} {file}"
    root, entries = read_root(file, source), {}
    if root is not None:
        _read_section(root, "", schema(cls), lambda node: f"{source}, {_line(node)}", references, entries)
    return entries


def read_root(file: str | Path, source: str) -> yaml.Node | None:
    """Return the root node of a YAML file without tags, anchors and aliases; None if the file is empty.

    Args:
        source: start of errors, which contains the file.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not YAML, is too large or too deeply nested, or has several documents.
    """
    with open(file, "rb") as stream:
        content = stream.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"{source} has more than {MAX_BYTES} bytes, the limit: give a shorter YAML file")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{source}, line {line}: it is not UTF-8 text: save the file as UTF-8") from None
    return _compose(text, source)


def read_word(cls: type, word: str, references: bool = False) -> dict[str, Entry]:
    """Return the values that a word `key=value` of a command line sets; see `read`.

    Text stays as it is written, except for quotes around all of it. Other values are YAML, such as [1,2].
    """
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise ValueError(f"expected key=value, such as solver.learning_rate=2e-4, got {shown(word)}")
    known, entries, source = schema(cls), {}, label(word)
    if key not in known:
        raise ValueError(f"{source}: {unknown(key, known)}")
    hint, spec = known[key]
    if is_dataclass(hint):
        _read_section(_word_node(text, False), f"{key}.", known, lambda _: source, references, entries)
    else:
        node = _word_node(text, type_of(hint) == (str, False))
        value, _ = _read_value(node, key, hint, spec, lambda _: source, references)
        entries[key] = Entry(value, source)
    return entries


def schema(cls: type, prefix: str = "") -> Schema:
    """Return key -> type and declaration of each field of a dataclass, of its sections and their fields."""
    hints, result = typing.get_type_hints(cls), {}
    for field in fields(cls):
        hint = hints[field.name]
        result[prefix + field.name] = hint, field.metadata.get(SPEC, Spec(""))
        if is_dataclass(hint):
            result |= schema(hint, f"{prefix}{field.name}.")
    return result


def parse(text: str, key: str, hint: Any, spec: Spec) -> Any:
    """Return the value of a field that is written as `text`.

    Raises:
        ValueError: the value has the wrong type or is outside its range.
    """
    kind, is_list = type_of(hint)
    try:
        value = None if is_list else _scalar(text, kind)
    except ValueError:
        value = None
    if value is None or not spec.allows(value, hint):
        got = str(value)[:SHOWN] if isinstance(value, int | float) else shown(text)
        raise ValueError(f"{key} must be {_expected(hint, spec)}, got {got}")
    return value


def shown(text: str) -> str:
    """Return a text in quotes for an error: one line, cut if it is long."""
    return repr(text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}...")


def label(text: str) -> str:
    """Return a text for the start of an error: unchanged if it is short and one line, else `shown`."""
    return text if text.isprintable() and len(text) <= SHOWN else shown(text)


def unknown(key: str, known: Schema) -> str:
    """Return the error of an unknown key, with the closest one."""
    if key in known:  # in a file, not in its section
        section, _, name = key.partition(".")
        return f"{key} must be written as a section: {section}: and in the next line, indented, {name}: VALUE"
    section, _, name = key.rpartition(".")
    siblings = [other for other in known if other.rpartition(".")[0] == section]
    for candidates in (siblings, known):
        close = get_close_matches(name, [other.rpartition(".")[2] for other in candidates], 1)
        if matches := [other for other in candidates if other.rpartition(".")[2] in close]:
            return f"unknown field {shown(key)}: did you mean {' or '.join(matches)}?"
    if not siblings and (matches := get_close_matches(key, known, 1)):
        return f"unknown field {shown(key)}: did you mean {matches[0]}?"
    siblings = siblings or [other for other in known if "." not in other]
    return f"unknown field {shown(key)}: the fields are {', '.join(siblings)}"


def _read_section(
    node: yaml.Node, prefix: str, known: Schema, where: Where, references: bool, entries: dict[str, Entry]
) -> None:
    """Add the values of a mapping node; `prefix` is the key of the section with a dot, or empty."""
    if _is_null(node):  # all lines of the section are comments
        return
    if not isinstance(node, yaml.MappingNode):
        subject = f"{prefix[:-1]} is a section and" if prefix else "the file"
        raise ValueError(f"{where(node)}: {subject} must contain fields, name: value; got {_described(node)}")
    first: dict[str, str] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            got = _described(key_node)
            raise ValueError(f"{where(key_node)}: the name of a field must be text, got {got}")
        key = prefix + key_node.value
        if key in first:
            fault = f"{shown(key)} is set twice, first in {first[key]}: remove one"
            raise ValueError(f"{where(key_node)}: {fault}")
        first[key] = _line(key_node)
        if key not in known or "." in key_node.value:
            raise ValueError(f"{where(key_node)}: {unknown(key, known)}")
        hint, spec = known[key]
        if is_dataclass(hint):
            _read_section(value_node, f"{key}.", known, where, references, entries)
        else:
            value, items = _read_value(value_node, key, hint, spec, where, references)
            entries[key] = Entry(value, where(key_node), items)


def _read_value(
    node: yaml.Node, key: str, hint: Any, spec: Spec, where: Where, references: bool
) -> tuple[Any, list[str]]:
    """Return the value of a node, and the start of errors about each of its items if it is a list."""
    kind, is_list = type_of(hint)
    must = f"{key} must be {_expected(hint, spec)}"
    quotes = ""
    if _is_null(node):
        if spec.allows(None, hint):
            return None, []
        quotes = "" if is_list or kind is not str else "; put text in quotes, or leave this field out"
    elif is_list and isinstance(node, yaml.SequenceNode):
        return _read_items(node, must, kind, spec, where), [where(item) for item in node.value]
    elif isinstance(node, yaml.ScalarNode):
        if references and "${" in node.value:
            return node.value, []
        try:
            return parse(node.value, key, hint, spec), []
        except ValueError as error:
            raise ValueError(f"{where(node)}: {error}") from None
    elif kind is str and not is_list:
        quotes = "; put text with special characters in quotes"
    raise ValueError(f"{where(node)}: {must}, got {_described(node)}{quotes}")


def _read_items(node: yaml.SequenceNode, must: str, kind: type, spec: Spec, where: Where) -> list:
    values = []
    for number, item in enumerate(node.value, 1):
        quotes = "; put a name in quotes if YAML reads it as something else" if kind is str else ""
        try:
            if _is_null(item) or not isinstance(item, yaml.ScalarNode):
                raise ValueError
            values.append(_scalar(item.value, kind))
            quotes = ""
            if not spec.allows(values[-1], kind):
                raise ValueError
        except ValueError:
            raise ValueError(f"{where(item)}: {must}; item {number} is {_described(item)}{quotes}") from None
    return values


def _scalar(text: str, kind: type) -> Any:
    """Return a text as a value of type str, bool, int or float.

    Raises:
        ValueError: the text is not a value of this type.
    """
    if kind is str:
        return text
    if kind is bool and text.lower() in BOOLEANS:
        return BOOLEANS[text.lower()]
    if kind is int and INTEGER.fullmatch(text):
        return int(text, 0)  # refuses 010, which is 8 in YAML
    if kind is float and FLOAT.fullmatch(text):
        return float(text.replace("_", ""))
    raise ValueError(text)


def _expected(hint: Any, spec: Spec) -> str:
    kind, is_list = type_of(hint)
    text = spec.expected(hint)
    if is_list:
        return f"a list of {text}, such as {'[dog, cat]' if kind is str else '[1, 2]'}"
    return text


def _described(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return "null" if _is_null(node) else shown(node.value)
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping (name: value)"


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.style is None and node.value in NULLS


def _line(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"


def _word_node(text: str, is_text: bool) -> yaml.Node:
    """Return the value of a word `key=value` as a node.

    Args:
        is_text: the field is text, which is read as YAML only if it is in quotes or brackets.
    """
    try:
        node = _compose(text, "value")
    except ValueError:
        node = None
    if not text or node is None:
        return yaml.ScalarNode("", text, style='"')
    enclosed = node.flow_style if isinstance(node, yaml.CollectionNode) else node.style in ("'", '"')
    return node if enclosed or not is_text else yaml.ScalarNode("", text.strip())


def _compose(text: str, source: str) -> yaml.Node | None:
    """Return the only document of a YAML text; None if it is empty."""
    try:
        return yaml.compose(text, _Loader)
    except yaml.reader.ReaderError as error:
        line, reason = text.count("\n", 0, error.position) + 1, f"the character {chr(error.character)!r}"
        raise ValueError(f"{source}, line {line}: {reason} is not allowed: remove it") from None
    except yaml.MarkedYAMLError as error:
        line, reason = _reason(error, BREAK.split(text))
        raise ValueError(f"{source}, line {line + 1}: {reason}") from None


class _Loader(yaml.SafeLoader):
    """Composer of nodes without tags, anchors and aliases, of bounded number and depth."""

    def __init__(self, text: str):
        super().__init__(text)
        self.values = self.depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        event = self.peek_event()
        self.values += 1
        self.depth += 1
        refused = ""
        if event.anchor is not None:
            refused = "anchors (&) and aliases (*) are not allowed: repeat the value, or put text in quotes"
        elif getattr(event, "tag", None) is not None:
            refused = "tags (!) are not allowed: remove it, or put text in quotes"
        elif self.depth > MAX_DEPTH:
            refused = f"values are nested more than {MAX_DEPTH} deep: remove brackets"
        elif self.values > MAX_VALUES:
            refused = f"the file has more than {MAX_VALUES} values: give a shorter YAML file"
        if refused:
            raise yaml.composer.ComposerError(None, None, refused, event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _reason(error: yaml.MarkedYAMLError, lines: Sequence[str]) -> tuple[int, str]:
    """Return the 0-based line of a YAML error and what is wrong there."""
    problem, line = error.problem, error.problem_mark.line
    start = error.context_mark.line if error.context_mark else line
    at = {number: shown(lines[min(number, len(lines) - 1)].strip()) for number in (line, start)}
    if error.context is None and isinstance(error, yaml.composer.ComposerError):  # of `_Loader`
        return line, problem
    if problem == "but found another document":
        return line, "the file contains several documents: remove the separator ---"
    if problem == "could not find expected ':'":
        return start, f"expected a field, name: value, with a blank after the colon; got {at[start]}"
    if problem == "mapping values are not allowed here":
        return line, "a colon is not allowed here: put text in quotes, or correct the indentation"
    if problem == "found character '\\t' that cannot start any token":
        return line, "a tab is not allowed here: indent with blanks"
    if "stream end" in problem or "end of stream" in problem:
        return start, f"the file ends before the bracket or quote of this line is closed: {at[start]}"
    cure = "put text with special characters in quotes, or correct the indentation"
    return line, f"invalid YAML ({problem}): {at[line]}; {cure}"
