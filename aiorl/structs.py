"""Structs of settings, to and from plain data as TOML holds it: every value checked, every error naming its key."""

from __future__ import annotations

import difflib
import functools
import math
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args, get_origin

import msgspec

from aiorl.errors import ConfigError

INT_MIN, INT_MAX = -(2**63), 2**63 - 1  # of TOML


def read_toml(path: str | Path) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no configuration file at {path}") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as TOML: {error}") from None


def convert(data: Any, kind: type[Any], where: str, prefix: str = "") -> Any:
    """Build a struct from plain data. ConfigError names `where`, the key (after `prefix`), its value and what to expect."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where}: {prefix.rstrip('.') or 'the whole'} = {data!r}: expected a table")
    table = cast("Mapping[Any, Any]", data)
    refuse_unknown(table, kind, where, prefix)
    try:
        return msgspec.convert(table, kind)
    except msgspec.ValidationError as error:
        text, _, place = str(error).partition(" - at `$.")
        place = place.rstrip("`")
        key = re.split(r"[.\[]", place)[0]
        if key not in table:
            raise ConfigError(f"{where}: {text}") from error.__cause__
        types = {field.name: field.type for field in msgspec.structs.fields(kind)}
        expected = _expected(text, types[key] if place == key else None)
        raise ConfigError(f"{where}: {prefix}{key} = {table[key]!r}: {expected}") from None


def refuse_unknown(keys: Iterable[Any], kind: type[Any], where: str, prefix: str = "") -> None:
    known = [field.name for field in fields_of(kind)]
    for key in map(str, keys):
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f" — did you mean `{prefix}{near[0]}`?" if near else f"\n  known: {', '.join(known)}"
            raise ConfigError(f"{where}: unknown key `{prefix}{key}`{hint}")


def _expected(message: str, kind: Any) -> str:
    """What msgspec found wrong, with the words that a field of type `kind` takes."""
    options = _options(kind)
    words = [str(option) for option in options if isinstance(option, str)]
    if words and "null" not in message:
        return f"expected {' or '.join(['int'] * (int in options) + words)}"
    return (message[:1].lower() + message[1:]).replace("`", "").replace("object", "table").replace(" | null", " or none")


def _options(kind: Any) -> list[Any]:
    """The alternatives of a type: int | Literal["auto"] gives [int, "auto"]."""
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    parts = get_args(kind)[:1] if get_origin(kind) is Annotated else get_args(kind)
    return [option for part in parts for option in _options(part)] or [kind]


@functools.cache  # evaluating the annotations takes a millisecond
def fields_of(kind: type[msgspec.Struct]) -> tuple[msgspec.structs.FieldInfo, ...]:
    return msgspec.structs.fields(kind)


def check_bounds(struct: msgspec.Struct, prefix: str) -> None:
    """Check types and bounds of a struct that was made by hand (msgspec checks only what it decodes)."""
    for field in fields_of(type(struct)):
        value, name = getattr(struct, field.name), prefix + field.name
        if field.type is Any or get_args(field.type)[:1] == (Any,):
            continue  # env and algo: looked at by themselves
        if isinstance(value, msgspec.Struct):
            check_bounds(value, f"{name}.")
            continue
        try:
            plain = msgspec.to_builtins(value)
            check_plain(plain, name)
            msgspec.convert(plain, field.type)
        except TypeError:
            raise not_for_toml(name, value) from None
        except msgspec.ValidationError as error:
            text = str(error).partition(" - at ")[0]
            raise ConfigError(f"{name} = {value!r}: {_expected(text, field.type)}") from None


def check_plain(value: Any, name: str) -> None:
    """Refuse what would not be the same after it was written to TOML and read again (but for tuples, which become lists)."""
    if isinstance(value, Mapping):
        for key, inner in cast("Mapping[Any, Any]", value).items():
            if inner is None or not isinstance(key, str):
                raise ConfigError(f"{name}: TOML cannot hold {key!r} = {inner!r}\n  give it a str as key, or leave it out")
            check_plain(inner, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(cast("list[Any]", value)):
            if inner is None:
                raise ConfigError(f"{name}[{index}]: TOML cannot hold None\n  leave it out, or use a value of its type")
            check_plain(inner, f"{name}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name} = {value}: expected a finite number")
    elif isinstance(value, int) and not INT_MIN <= value <= INT_MAX:
        bound = f"at least {INT_MIN}" if value < 0 else f"at most {INT_MAX}"
        raise ConfigError(f"{name} = {value}: expected {bound}")
    elif isinstance(value, str) and not _is_unicode(value):
        raise ConfigError(f"{name} = {value!r}: expected a text that UTF-8 can hold")
    elif not (value is None or isinstance(value, str | int | float)):
        raise not_for_toml(name, value)


def _is_unicode(text: str) -> bool:
    """Not so of a file's name that is other bytes, as Python reads it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def not_for_toml(name: str, value: Any) -> ConfigError:
    return ConfigError(
        f"{name} = {value!r}: values of type {type(value).__name__} cannot be written to TOML\n"
        "  use numbers, texts, true or false, lists and tables"
    )


def as_in_a_file(value: Any) -> Any:
    """A struct or plain data as reading a file would give it: tables and lists, no tuples. Raises TypeError for the rest."""
    return msgspec.json.decode(msgspec.json.encode(value))


def without_none(table: Mapping[str, Any]) -> dict[str, Any]:
    """A table without what is None, also within the tables in it: TOML leaves out what is not set."""
    kept = {key: value for key, value in table.items() if value is not None}
    return {k: without_none(cast("Mapping[str, Any]", v)) if isinstance(v, Mapping) else v for k, v in kept.items()}


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Two nested tables as one; where both have a value, `above` has its way."""
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping) and key != "env_kwargs"
        result[key] = merge(cast("dict[str, Any]", old), cast("dict[str, Any]", value)) if both else value
    return result
