"""Settings that are declared once: a dataclass field with its help text and range.

    @dataclass(frozen=True)
    class CamSettings(Settings):
        affinity_layers: int = setting(8, "last blocks whose attention is averaged", least=1)

Flags (`add_flags`, `from_args`), range checks (`Settings`) and the option tables of docs/
(`foundation.docs`) are derived from the field. The same dataclasses are the schema of YAML files
(`foundation.yamlfile`), and an output folder records their values.
"""

import argparse
import math
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, replace
from numbers import Integral, Real
from typing import Any, TypeVar

SPEC = "setting"  # key of a field's metadata
METAVARS = {int: "N", float: "X", str: "TEXT"}
TYPES = {bool: bool, int: Integral, float: Real, str: str}
WORDS = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}
PLURALS = {int: "whole numbers", float: "numbers", str: "names"}  # of the items of a list
T = TypeVar("T")


@dataclass(frozen=True)
class Spec:
    """Declaration of a setting, without its default.

    Attributes:
        help: what the setting does, in one sentence; shown by --help and in docs/.
        least, most: inclusive range of a number, or of each number of a list.
        above: exclusive lower bound.
        choices: allowed values: a sequence, or a dict whose keys are the allowed values.
        aliases: other spellings of the flag, such as the flag of a reference implementation.
        none: word for None on the command line, such as "auto"; --help shows it as the default.
        metavar: placeholder for the value in --help.
        items: what the items of a list are, in errors; None: names or numbers.
    """

    help: str
    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    choices: Collection[str] | None = None
    aliases: Sequence[str] = ()
    none: str | None = None
    metavar: str | None = None
    items: str | None = None

    def allows(self, value: Any, hint: Any) -> bool:
        """Return whether a value has the annotated type `hint` and is in the choices or the range.

        If the value is a list, each item is checked.
        """
        kind, is_list = type_of(hint)
        if value is None:
            return isinstance(hint, types.UnionType)
        if is_list:
            return isinstance(value, list | tuple) and all(self.allows(item, kind) for item in value)
        if not isinstance(value, TYPES[kind]) or (isinstance(value, bool) and kind is not bool):
            return False
        if self.choices is not None:
            return value in self.choices
        if kind in (bool, str):
            return True
        return math.isfinite(value) and self.above < value and self.least <= value <= self.most

    def expected(self, hint: Any) -> str:
        """Return the allowed values in words, e.g. "a whole number, 1 or more"; `hint` is the annotation."""
        if self.choices is not None:
            return f"one of {', '.join(self.choices)}"
        kind, is_list = type_of(hint)
        text = (self.items or PLURALS[kind]) if is_list else WORDS[kind]
        if math.isfinite(self.least) and math.isfinite(self.most):
            return f"{text} from {self.least:g} to {self.most:g}"
        if math.isfinite(self.above):
            text += f" above {self.above:g}"
        if math.isfinite(self.least):
            text += f", {self.least:g} or more"
        return f"{text}, {self.most:g} or less" if math.isfinite(self.most) else text


def setting(default: Any, help: str, **options: Any) -> Any:
    """Return a dataclass field that declares a setting; `options` are the other attributes of `Spec`."""
    metadata = {SPEC: Spec(help, **options)}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


class Settings:
    """Base class of settings dataclasses; raises ValueError for a value outside its range.

    `SECTION` is the prefix of names in errors, such as "solver." for that section of a YAML configuration.
    """

    SECTION = ""

    def __post_init__(self):
        for name, spec, hint, _ in _declared(type(self)):
            value = getattr(self, name)
            if not spec.allows(value, hint):
                raise ValueError(f"{self.SECTION}{name} must be {spec.expected(hint)}, got {value!r}")


def add_flags(parser: Any, cls: type, show: Mapping[str, str] | None = None) -> None:
    """Add a flag for each setting of a dataclass.

    A flag that is not given adds no attribute to the namespace, so that `from_args` keeps the value of its
    argument `base`.

    Args:
        parser: ArgumentParser or argument group.
        cls: dataclass of settings.
        show: setting name -> text that --help shows as the default instead of the declared one, such as
            "the benchmark's".
    """
    for name, spec, hint, default in _declared(cls):
        shown = (show or {}).get(name) or _as_text(default, spec)
        help = spec.help + (f" (default: {shown})" if shown else "")
        options: dict[str, Any] = {"help": help.replace("%", "%%")}
        kind, is_list = type_of(hint)
        if kind is bool:
            options["action"] = _Switch
        elif spec.choices is not None:
            options["choices"] = list(spec.choices)
        else:
            metavar = spec.metavar or (f"{METAVARS[kind]},..." if is_list else METAVARS[kind])
            options |= {"type": _parser(hint, spec), "metavar": metavar}
        parser.add_argument(f"--{name}", *spec.aliases, dest=name, default=argparse.SUPPRESS, **options)


def given(cls: type, args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of `cls` that were given on the command line: name -> value."""
    return {name: getattr(args, name) for name, *_ in _declared(cls) if hasattr(args, name)}


def from_args(base: T, args: argparse.Namespace) -> T:
    """Return `base`, a dataclass of settings, updated with the values given on the command line."""
    return replace(base, **given(type(base), args))


def rows(cls: type, prefix: str = "--", values: Any = None) -> list[tuple[str, str, str]]:
    """Return (name, default, help) of each setting of a dataclass and of its nested sections.

    Args:
        prefix: "--" for flags; "" for the keys of a YAML file.
        values: instance whose values are listed as defaults; None lists the declared defaults.
    """
    result = []
    for declared in fields(cls):
        default = _default(declared) if values is None else getattr(values, declared.name)
        if is_dataclass(default):
            result += rows(type(default), f"{prefix}{declared.name}.", default)
        elif spec := declared.metadata.get(SPEC):
            choices = f": {', '.join(f'`{choice}`' for choice in spec.choices)}" if spec.choices else ""
            shown = _as_text(default, spec) or ("off" if default is False else "")
            result.append((f"{prefix}{declared.name}", shown, spec.help + choices))
    return result


class _Switch(argparse.Action):
    """Flag --name (True) with --no_name (False); also accepts --no-name, and --no-alias for each alias."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options):
        off = [f"--no_{option_strings[0][2:]}", *(f"--no-{flag[2:]}" for flag in option_strings)]
        self.off = frozenset(off)
        super().__init__([*option_strings, *off], dest, nargs=0, **options)

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, option_string not in self.off)


def _parser(hint: Any, spec: Spec) -> Callable[[str], Any]:
    """Return an argparse type that parses and checks a value; list items are separated by commas."""
    kind, is_list = type_of(hint)

    def parse(text: str) -> Any:
        if spec.none is not None and text == spec.none:
            return None
        try:
            values = tuple(kind(word) for word in (text.split(",") if is_list else [text]))
        except ValueError:
            values = (math.nan,)
        if not spec.allows(values if is_list else values[0], hint):
            more = ", separated by commas" if is_list else f", or {spec.none}" if spec.none else ""
            raise argparse.ArgumentTypeError(f"expected {spec.expected(hint)}{more}")
        return values if is_list else values[0]

    return parse


def _declared(cls: type) -> Iterator[tuple[str, Spec, Any, Any]]:
    """Yield name, spec, annotation and default of each setting."""
    hints = typing.get_type_hints(cls)
    for declared in fields(cls):
        if SPEC in declared.metadata:
            yield declared.name, declared.metadata[SPEC], hints[declared.name], _default(declared)


def _default(declared: Field) -> Any:
    return declared.default if declared.default is not MISSING else declared.default_factory()


def _as_text(value: Any, spec: Spec) -> str:
    """Return a default as text for --help and docs/: empty for False, and for None if `spec.none` is None."""
    if value is None:
        return spec.none or ""
    if isinstance(value, bool):
        return "on" if value else ""
    if isinstance(value, list | tuple):
        return ",".join(f"{item:g}" for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def type_of(hint: Any) -> tuple[type, bool]:
    """Return the type of a value or list item (bool, int, float, str), and whether `hint` is a list.

    `X | None` counts as X.
    """
    if isinstance(hint, types.UnionType):
        hint = next(member for member in typing.get_args(hint) if member is not type(None))
    is_list = typing.get_origin(hint) in (list, tuple)
    return (typing.get_args(hint)[0] if is_list else hint), is_list


count = _parser(int, Spec("", least=1))  # argparse type, 1 or more, for flags that are not settings
