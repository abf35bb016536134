"""Command-line flags made from the fields of a msgspec struct: name, type, help text and default come from the field.

Only flags that were given appear in the result, so flags lie over a configuration file just as that lies over a preset.
"""

from __future__ import annotations

import argparse
import difflib
import re
import shutil
import types
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, Literal, NoReturn, Union, cast, get_args, get_origin

import msgspec

from aiorl.errors import ConfigError
from aiorl.structs import INT_MAX

NAMES = {
    "total_steps": "steps", "step_timeout_s": "step-timeout", "start_timeout_s": "start-timeout",
    "stall_timeout_s": "stall-timeout", "shutdown_timeout_s": "shutdown-timeout",
}  # fmt: skip
"""Fields whose flag is called otherwise."""

_COUNT = re.compile(r"([+-]?[0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)([kKmMgG]?)")
_UNITS = {"": 1, "k": 1_000, "m": 1_000_000, "g": 1_000_000_000}


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are ConfigErrors of at most three lines, with a suggestion for an unknown flag."""

    def __init__(self, verb: str, description: str, usage: str = "", epilog: str = "") -> None:
        super().__init__(
            prog=f"python -m aiorl {verb}",
            usage=f"python -m aiorl {verb} {usage}" if usage else None,
            description=description,
            epilog=epilog,
            formatter_class=_Formatter,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
            add_help=False,
        )
        self.verb = verb
        # What is taken for a value and not for a flag. argparse's own, until Python 3.14, knows -1 and -1.5, but not -1k.
        self._negative_number_matcher = re.compile(r"-\.?\d")
        self.aliases: dict[str, str] = {}
        self.add_argument("-h", "--help", action="store_true", help="show this help and exit")

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument ([^:]+):", r"\1:", message)
        raise ConfigError(f"{message}\n  see `{self.prog} --help`")

    def read(self, argv: Sequence[str]) -> dict[str, Any]:
        """The arguments that were given, by destination. Raises ConfigError for anything unknown."""
        given, extra = self.parse_known_args(list(argv))
        if extra and not getattr(given, "help", False):
            self._refuse(extra)
        return vars(given)

    def _refuse(self, extra: Sequence[str]) -> NoReturn:
        first = next((e for e in extra if e.startswith("-")), None)
        if first is None:
            raise ConfigError(f"unexpected argument `{extra[0]}`\n  see `{self.prog} --help`")
        name = first.split("=", 1)[0]
        for action in self._actions:
            self.aliases.update({o.lstrip("-"): o for o in action.option_strings if o.startswith("--")})
        near = difflib.get_close_matches(name.lstrip("-"), list(self.aliases), 1, cutoff=0.6)
        hint = f"did you mean `{self.aliases[near[0]]}`?" if near else f"see `{self.prog} --help`"
        raise ConfigError(f"unknown flag `{name}`\n  {hint}")


class _Formatter(argparse.HelpFormatter):
    """A little wider in the left column than argparse's own, and never wider than is good to read."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=min(110, shutil.get_terminal_size().columns - 1))


def add_fields(
    parser: Parser,
    group: argparse._ArgumentGroup,  # pyright: ignore[reportPrivateUsage]
    struct: type[msgspec.Struct],
    names: Iterable[str],
    defaults: Mapping[str, Any],
    prefix: str = "",
    origins: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """A flag for each named field. In the help, `defaults` go before the struct's own.

    `origins`, by the field with its prefix, says where one of them is from, if that is not the default: "preset".
    """
    fields = {f.name: f for f in msgspec.structs.fields(struct)}
    for name in names:
        field = fields[name]
        default = defaults.get(name, field.default if field.default is not msgspec.NODEFAULT else field.default_factory)
        if callable(default):
            default = default()
        _add_flag(parser, group, prefix + name, field.type, default, origins.get(prefix + name, "default"))


def _add_flag(parser: Parser, group: Any, key: str, kind: Any, default: Any, origin: str) -> None:
    flag = "--" + NAMES.get(key, key).replace("_", "-")
    parser.aliases.update({alias: flag for alias in (key, key.rsplit(".", 1)[-1].replace("_", "-"))})
    text = description(kind).replace("%", "%%")
    # Where the text itself says what the default is, "None" would only confuse.
    silent = default is None or default is msgspec.NODEFAULT or (origin == "default" and "default:" in text)
    shown = "" if silent else f" ({origin}: {show(default)})"
    common: dict[str, Any] = {"dest": key, "help": text + shown.replace("%", "%%")}
    if bare(kind) is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
    elif get_origin(bare(kind)) is dict:
        group.add_argument(flag, nargs="+", action="extend", metavar="KEY=VALUE", **common)
    elif get_origin(bare(kind)) in (tuple, list):
        group.add_argument(flag, nargs="+", metavar=metavar(kind), **common)
    else:
        group.add_argument(flag, metavar=metavar(kind), **common)


def field_value(key: str, given: Any, kind: Any) -> Any:
    """The value of a field from the text (or texts) on the command line. Raises ConfigError naming the flag."""
    flag = "--" + NAMES.get(key, key).replace("_", "-")
    if isinstance(given, bool):
        return given
    if get_origin(bare(kind)) is dict:
        return dict(key_value(flag, text) for text in given)
    if isinstance(given, list):
        texts = [t for text in cast("list[str]", given) for t in text.split(",") if t]
        return convert_text(flag, " ".join(texts), [scalar(t) for t in texts], kind)
    return convert_text(flag, given, number(given) if _takes_numbers(kind) else given, kind)


def convert_text(flag: str, text: str, value: Any, kind: Any) -> Any:
    options = members(kind)
    if isinstance(value, str) and value.lower() == "none" and type(None) in options:
        return None
    if isinstance(value, float) and value.is_integer() and int in options and float not in options:
        value = int(value)
    try:
        return msgspec.convert(value, kind, strict=False)
    except msgspec.ValidationError as error:
        choices = [o for o in options if isinstance(o, str)]
        near = difflib.get_close_matches(text, choices, 1)
        hint = f" — did you mean `{near[0]}`?" if near else ""
        bound = re.search(r"`(?:int|float)` ([<>]=? \S+)", str(error))
        expected = f"{wanted(kind)}, {bound[1]}" if bound and not isinstance(value, str) else wanted(kind)
        raise ConfigError(f"{flag} {text}: expected {expected}{hint}") from None


def number(text: str) -> int | float | str:
    """`200k`, `1.5M`, `1e6`, `200_000` as numbers (whole where they are); any other text as it is."""
    match = _COUNT.fullmatch(text)
    if match is None:
        return text
    digits, unit = match[1].replace("_", ""), match[2].lower()
    if re.fullmatch(r"[+-]?\d+", digits):
        return int(digits) * _UNITS[unit]
    value = float(digits) * _UNITS[unit]
    return round(value) if unit and abs(value) <= INT_MAX and abs(value - round(value)) < 1e-6 else value


def scalar(text: str) -> Any:
    """A number, true, false, none, or the text itself: by its look, never by evaluating it. As in help, yes is true.

    `1e3` is a whole number, `1e38` too large for one.
    """
    words: dict[str, Any] = {"true": True, "yes": True, "false": False, "no": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    value = number(text)
    whole = isinstance(value, float) and value.is_integer() and "." not in text and abs(value) <= INT_MAX
    return int(value) if whole else value


def key_value(flag: str, text: str) -> tuple[str, Any]:
    """`gravity=-9.8` as ("gravity", -9.8); a value with brackets, braces or quotes is read as JSON."""
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise ConfigError(f"{flag} {text}: expected key=value, for example {flag} gravity=-9.8")
    if value[:1] in ("[", "{", '"'):
        try:
            return key, msgspec.json.decode(value)
        except msgspec.DecodeError as error:
            raise ConfigError(f"{flag} {text}: the value is not valid JSON: {error}") from None
    return key, scalar(value)


def bare(kind: Any) -> Any:
    """A type without its Annotated shell and without None."""
    while get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if get_origin(kind) in (Union, types.UnionType):
        rest = [a for a in get_args(kind) if a is not type(None)]
        if len(rest) == 1:
            return bare(rest[0])
    return kind


def members(kind: Any) -> list[Any]:
    """The alternatives of a type: int | Literal["auto"] gives [int, "auto"]."""
    while get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if get_origin(kind) in (Union, types.UnionType):
        return [m for part in get_args(kind) for m in members(part)]
    return list(get_args(kind)) if get_origin(kind) is Literal else [kind]


def _takes_numbers(kind: Any) -> bool:
    return any(option in (int, float, Any) for option in members(kind))


def description(kind: Any) -> str:
    """The `Meta` description of an annotated type, or of an annotated part of a union."""
    inside = get_args(kind)
    own = [part.description for part in inside if isinstance(part, msgspec.Meta) and part.description]
    return own[0] if own else next((text for part in inside if (text := description(part))), "")


def wanted(kind: Any) -> str:
    """What a person should type for this type."""
    names = {int: "a whole number such as 4096 or 200k", float: "a number", str: "a text", bool: "true or false"}
    options = members(kind)
    words = [str(o) for o in options if isinstance(o, str)]
    listed = [names[o] for o in options if isinstance(o, type) and o in names]
    if get_origin(bare(kind)) in (tuple, list):
        listed.append("numbers separated by commas")
    text = f"one of {', '.join(words)}" if len(words) > 1 else "".join(words)
    return " or ".join([*listed, *([text] if text else []), *(["none"] if type(None) in options else [])])


def metavar(kind: Any) -> str:
    options = members(kind)
    words = [str(o) for o in options if isinstance(o, str)]
    if len(words) > 1 and len(words) == len(options):
        return "|".join(words)
    sequence = get_origin(bare(kind)) in (tuple, list)
    letter = "N" if int in options or sequence else "X" if float in options else "NAME"
    return "|".join([letter, *words])


def show(value: Any) -> str:
    """A default as one would type it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:_}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (tuple, list)):
        return " ".join(show(v) for v in cast("Sequence[Any]", value))
    if isinstance(value, dict):
        return " ".join(f"{k}={show(v)}" for k, v in cast("dict[str, Any]", value).items()) or "none"
    return str(value)
