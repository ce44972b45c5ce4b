"""Settings that are declared once: a dataclass field with its help text and range.

    @dataclass(frozen=True)
    class CamSettings(Settings):
        affinity_layers: int = setting(8, "last blocks whose attention is averaged", least=1)

Flags (`add_flags`, `from_args`), range checks (`Settings`), and the option tables of docs/ (`common.docs`)
derive from the field. The same dataclasses are the schema of YAML configurations (OmegaConf), and their
values are what an output folder records.
"""

import argparse
import math
import types
import typing
from collections.abc import Collection, Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, replace
from typing import Any, TypeVar

SPEC = "setting"  # key of a field's metadata


@dataclass(frozen=True)
class Spec:
    """What `setting` declares beside the default; see there."""

    help: str
    least: float | None = None
    most: float | None = None
    above: float | None = None
    choices: Collection[str] | None = None
    aliases: Sequence[str] = ()
    none: str | None = None
    metavar: str | None = None


def setting(
    default: Any,
    help: str,
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    choices: Collection[str] | None = None,
    aliases: Sequence[str] = (),
    none: str | None = None,
    metavar: str | None = None,
) -> Any:
    """Return a dataclass field that declares a setting.

    Args:
        default: value where the user says nothing.
        help: what it does, in one sentence; shown by --help and in docs/.
        least, most, above: range of a number, or of each number of a list; `above` excludes the bound.
        choices: allowed values, a sequence or the registry (dict) they come from.
        aliases: further spellings of the flag, such as those of a reference implementation.
        none: word that stands for None on the command line, such as "auto"; it is shown as the default.
        metavar: placeholder of the value in --help.
    """
    metadata = {SPEC: Spec(help, least, most, above, choices, tuple(aliases), none, metavar)}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


class Settings:
    """Base of dataclasses of settings: values outside their range raise ValueError.

    `SECTION` precedes the names in errors: "solver." for a section of a YAML configuration.
    """

    SECTION = ""

    def __post_init__(self):
        check(self)


T = TypeVar("T")


def check(settings: Settings) -> None:
    """Raise ValueError for the first setting whose value is outside its range."""
    for declared, spec in _declared(type(settings)):
        value = getattr(settings, declared.name)
        values = value if isinstance(value, list | tuple) else [value]
        if not all(item is None or _fits(item, spec) for item in values):
            hint = typing.get_type_hints(type(settings))[declared.name]
            name = settings.SECTION + declared.name
            raise ValueError(f"{name} must be {expected(spec, hint)}, got {value!r}")


def expected(spec: Spec, hint: Any) -> str:
    """Return the allowed values of a setting in words, such as "a whole number, 1 or more"."""
    if spec.choices is not None:
        return f"one of {', '.join(spec.choices)}"
    if _is_list(hint):
        kind = "numbers"
    else:
        kind = "a whole number" if _kind(hint) is int else "a number"
    if spec.above is not None:
        return f"{kind} above {spec.above:g}"
    if spec.least is None and spec.most is None:
        return kind
    if spec.least is None:
        return f"{kind}, {spec.most:g} or less"
    if spec.most is None:
        return f"{kind}, {spec.least:g} or more"
    return f"{kind} from {spec.least:g} to {spec.most:g}"


def add_flags(
    parser: Any,
    cls: type,
    omit: Collection[str] = (),
    defaults: Any = None,
    show: dict[str, str] | None = None,
) -> None:
    """Add one flag for each setting of a dataclass.

    A flag that is not given leaves no attribute in the namespace, so that `from_args` keeps the default of
    whatever it starts from.

    Args:
        parser: ArgumentParser or argument group.
        cls: dataclass of settings.
        omit: names of settings without a flag.
        defaults: instance whose values --help shows; None shows the declared defaults.
        show: name -> text shown as the default where another rule decides, such as "the benchmark's".
    """
    hints = typing.get_type_hints(cls)
    for declared, spec in _declared(cls):
        name = declared.name
        if name in omit:
            continue
        default = getattr(defaults, name) if defaults is not None else _default(declared)
        shown = (show or {}).get(name) or _as_text(default, spec)
        options: dict[str, Any] = {
            "dest": name,
            "default": argparse.SUPPRESS,
            "help": (spec.help + (f" (default: {shown})" if shown else "")).replace("%", "%%"),
        }
        flags = [f"--{name}", *spec.aliases]
        if _kind(hints[name]) is bool:
            parser.add_argument(*flags, action=_Switch, **options)
            continue
        if spec.choices is not None:
            options["choices"] = list(spec.choices)
        else:
            options["type"] = parser_of(hints[name], spec)
            options["metavar"] = spec.metavar or _METAVARS.get(_kind(hints[name]), "X")
        parser.add_argument(*flags, **options)


def given(cls: type, args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of `cls` that were given as flags: name -> value."""
    return {declared.name: getattr(args, declared.name) for declared, _ in _declared(cls)
            if hasattr(args, declared.name)}  # fmt: skip


def from_args(base: T, args: argparse.Namespace) -> T:
    """Return `base` with the settings that were given as flags.

    Args:
        base: instance of a dataclass whose flags `add_flags` added.

    Raises:
        ValueError: settings that contradict each other, see the dataclass.
    """
    return replace(base, **given(type(base), args))


def parser_of(hint: Any, spec: Spec) -> Any:
    """Return an argparse type: text -> value of the annotated type, within the range.

    Lists are separated by commas.
    """
    kind, is_list = _kind(hint), _is_list(hint)

    def parse(text: str) -> Any:
        if spec.none is not None and text == spec.none:
            return None
        words = text.split(",") if is_list else [text]
        try:
            values = [kind(word) for word in words]
        except ValueError:
            values = [math.nan]
        if kind in (int, float) and not all(_fits(value, spec) for value in values):
            more = ", separated by commas" if is_list else f", or {spec.none}" if spec.none else ""
            raise argparse.ArgumentTypeError(f"expected {expected(spec, hint)}{more}")
        return tuple(values) if is_list else values[0]

    return parse


def rows(cls: type, prefix: str = "--", defaults: Any = None) -> list[tuple[str, str, str]]:
    """Return (name, default, help) of each setting of a dataclass, nested sections included.

    Args:
        prefix: "--" for flags; "" for the keys of a YAML file.
    """
    found = []
    for declared in fields(cls):
        default = getattr(defaults, declared.name) if defaults is not None else _default(declared)
        if is_dataclass(default):
            found += rows(type(default), f"{prefix}{declared.name}.", default)
        elif spec := declared.metadata.get(SPEC):
            shown = _as_text(default, spec) or ("off" if default is False else "")
            values = f": {', '.join(f'`{choice}`' for choice in spec.choices)}" if spec.choices else ""
            found.append((f"{prefix}{declared.name}", shown, spec.help + values))
    return found


class _Switch(argparse.Action):
    """--name and --no_name (also --no-name): True and False."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options):
        off = [f"--no{mark}{flag[2:]}" for flag in option_strings for mark in "_-"]
        self.off = frozenset(off)
        super().__init__([*option_strings, *off], dest, nargs=0, **options)

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, option_string not in self.off)

    def format_usage(self) -> str:
        return self.option_strings[0]


_METAVARS = {int: "N", float: "X", str: "TEXT"}


def _declared(cls: type) -> Iterator[tuple[Field, Spec]]:
    for declared in fields(cls):
        if SPEC in declared.metadata:
            yield declared, declared.metadata[SPEC]


def _fits(value: Any, spec: Spec) -> bool:
    if spec.choices is not None:
        return value in spec.choices
    if isinstance(value, bool | str):
        return True
    return (
        (math.isfinite(value))
        and (spec.least is None or value >= spec.least)
        and (spec.most is None or value <= spec.most)
        and (spec.above is None or value > spec.above)
    )


def _default(declared: Field) -> Any:
    return declared.default if declared.default is not MISSING else declared.default_factory()


def _as_text(value: Any, spec: Spec) -> str:
    """The default in --help and docs/; empty where the help text says what happens, and for switches."""
    if value is None:
        return spec.none or ""
    if isinstance(value, bool):
        return "on" if value else ""
    if isinstance(value, list | tuple):
        return ",".join(f"{item:g}" for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _members(hint: Any) -> list[Any]:
    """The types of a union, None left out; of any other annotation itself."""
    members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return [member for member in members if member is not type(None)]


def _is_list(hint: Any) -> bool:
    return typing.get_origin(_members(hint)[0]) in (list, tuple)


def _kind(hint: Any) -> type:
    """bool, int, float or str: the type of a setting, or of its list's items."""
    member = _members(hint)[0]
    return typing.get_args(member)[0] if _is_list(hint) else member
