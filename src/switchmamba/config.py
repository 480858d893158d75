"""Configuration: TOML tables, dotted overrides, and errors that name the field and the nearest right name.

Every configuration class of the project is a :class:`Config`: immutable, strict, unknown keys refused. A configuration
file has the tables ``model``, ``data`` and ``training``; which class reads a table is the business of the package that
owns it. This module knows no field and imports no torch.
"""

import difflib
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer, ValidationError

from switchmamba.errors import ConfigError

Tables = dict[str, Any]
"""Nested tables as TOML gives them: names to values or to further tables."""


class Config(BaseModel):
    """Base of all configuration classes: immutable, strictly typed, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)


def _ratio(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float, str, Fraction)):
        raise ValueError("must be a number or a fraction such as '2/3'")
    written = str(value) if isinstance(value, float) else value  # 0.7 is 7/10, not its binary neighbour
    try:
        ratio = Fraction(written)
    except (ValueError, ZeroDivisionError, OverflowError):
        raise ValueError("must be a number or a fraction such as '2/3'") from None
    if ratio <= 0:
        raise ValueError("must be greater than 0")
    return ratio


def _plain_ratio(ratio: Fraction) -> int | str:
    return int(ratio) if ratio.denominator == 1 else str(ratio)


Ratio = Annotated[Fraction, BeforeValidator(_ratio), PlainSerializer(_plain_ratio)]
"""A positive rational number, written as a number or as a string such as ``"2/3"``."""

ConfigType = TypeVar("ConfigType", bound=Config)


def read_toml(path: Path) -> Tables:
    """Read a TOML file; :class:`ConfigError` names the file, and the line where TOML says it."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a directory; name a TOML file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def parse_overrides(arguments: Sequence[str]) -> list[tuple[str, Any]]:
    """Turn ``--training.steps 100`` or ``--training.steps=100`` into ``[("training.steps", 100)]``.

    Values are read as TOML (``1e-3``, ``true``, ``["mamba", "moe"]``); what is no TOML value is a string. Bare ``none``
    sets a field to null, which TOML cannot write.
    """
    overrides: list[tuple[str, Any]] = []
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        if not argument.startswith("--") or "." not in argument.split("=")[0]:
            raise ConfigError(
                f"unexpected argument {argument!r}; overrides look like --training.learning_rate 1e-3"
            )
        name, equals, value = argument[2:].partition("=")
        if not equals:
            if not remaining:
                raise ConfigError(f"--{name} needs a value")
            value = remaining.pop(0)
        overrides.append((name, _parse_value(value)))
    return overrides


def _parse_value(text: str) -> Any:
    if text.lower() == "none":
        return None
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def apply_overrides(tables: Mapping[str, Any], overrides: Iterable[tuple[str, Any]]) -> Tables:
    """Return a copy of ``tables`` with each dotted name set to its value.

    A table whose ``kind`` becomes another one starts anew: what it held besides belonged to what it was.
    """
    result: Tables = _copy(tables)
    given: list[str] = []
    for name, value in overrides:
        *parents, last = name.split(".")
        table = result
        for parent in parents:
            if not isinstance(table.setdefault(parent, {}), dict):
                raise ConfigError(f"{name}: {parent} is a value, not a table")
            table = table[parent]
        if last == "kind" and table.get("kind", value) != value:
            beside = name.removesuffix("kind")
            for key in [key for key in table if not _is_given(beside + key, given)]:
                del table[key]
        table[last] = value
        given.append(name)
    return result


def _is_given(name: str, given: Iterable[str]) -> bool:
    """Tell whether a name, one above it or one below it is among those given."""
    return any(f"{name}.".startswith(f"{other}.") or other.startswith(f"{name}.") for other in given)


def _copy(value: Any) -> Any:
    return {key: _copy(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def validate(config_class: type[ConfigType], tables: Mapping[str, Any], source: str) -> ConfigType:
    """Build ``config_class`` from ``tables``; a violation becomes a one-line :class:`ConfigError` naming ``source``."""
    try:
        return config_class.model_validate(tables)
    except ValidationError as error:
        messages = [_message(config_class, tables, detail) for detail in error.errors(include_url=False)]
        raise ConfigError(f"{source}: {'; '.join(messages)}") from None


def _message(config_class: type[Config], tables: Mapping[str, Any], detail: Any) -> str:
    location = tuple(detail["loc"])
    name = _written_name(tables, location)
    kind, text, value = detail["type"], detail["msg"].removeprefix("Value error, "), detail.get("input")
    if kind == "extra_forbidden":
        members = _members(config_class, location[:-1])
        known = sorted({field for member in members for field in member.model_fields})
        return f"unknown key {name}{nearest(str(location[-1]), known)}"
    if kind == "missing":
        return f"{name} is missing"
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        tags = sorted(str(_tag(member)) for member in _members(config_class, location))
        if kind == "union_tag_invalid":
            return f"{name}.kind = {detail['ctx']['tag']!r}{nearest(detail['ctx']['tag'], tags)}"
        return f"{name}.kind is missing (one of {', '.join(tags)}){_nearest_sibling(tables, location)}"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        text = "must be a table"
    if isinstance(value, (Mapping, BaseModel)):
        return f"{name}: {text}" if name else text
    return f"{name} = {value!r}: {text[0].lower()}{text[1:]}"


def _written_name(tables: Any, location: Sequence[Any]) -> str:
    """Return the dotted name as the user wrote it: without the union tags that pydantic adds to a location."""
    parts: list[str] = []
    for i, part in enumerate(location):
        is_last = i == len(location) - 1
        inside = isinstance(tables, Mapping) and part in tables
        if not inside and isinstance(tables, Mapping) and (not is_last or part == tables.get("kind")):
            continue
        if inside and not is_last and not isinstance(tables[part], (Mapping, list)):
            continue  # a tag that is also the name of a field, such as top_k
        parts.append(str(part))
        tables = tables[part] if inside else None
    return ".".join(parts)


def nearest(name: str, known: Sequence[str]) -> str:
    """Return ``"; did you mean X?"`` for the name that is meant, or the list of them all if none is near.

    What has ``name`` for its initials is meant before what is spelt alike: learning_rate by lr.
    """
    initials = [key for key in known if "_" in key and "".join(word[:1] for word in key.split("_")) == name]
    alike = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    meant = [*initials, *(key for key in alike if _is_near(name, key))]
    if meant:
        return f"; did you mean {meant[0]}?"
    return f"; known: {', '.join(known)}" if known else ""


def _is_near(name: str, key: str) -> bool:
    """Tell whether a key that is spelt alike may be meant: a poor guess misleads."""
    shorter, longer = sorted((name, key), key=len)
    if len(shorter) > 2 and shorter in longer:
        return True
    if len(longer) - len(shorter) > max(1, len(longer) // 3):
        return False
    return name[:1] == key[:1] or difflib.SequenceMatcher(None, name, key).ratio() >= 0.75


def _nearest_sibling(tables: Any, location: Sequence[Any]) -> str:
    """Return ``"; did you mean X?"`` if a table beside ``location`` has a kind and nearly the same name."""
    for part in location[:-1]:
        tables = tables.get(part, {}) if isinstance(tables, Mapping) else {}
    siblings = [key for key, value in tables.items() if isinstance(value, Mapping) and "kind" in value]
    close = difflib.get_close_matches(str(location[-1]), siblings, n=1, cutoff=0.5)
    return f"; did you mean {'.'.join(map(str, [*location[:-1], close[0]]))}?" if close else ""


def _members(annotation: Any, location: Sequence[Any]) -> list[type[BaseModel]]:
    """Return the classes that may stand at ``location`` below ``annotation``: of a union all of its members."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if not location:
            return [annotation]
        field = annotation.model_fields.get(str(location[0]))
        return _members(field.annotation, location[1:]) if field else []
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _members(arguments[0], location)
    if origin in (dict, list, tuple):
        return _members(arguments[-1], location[1:])
    # pydantic puts the discriminator's value into the location: take the member that bears it.
    tagged = [a for a in arguments if location and _tag(a) == location[0]]
    rest = location[1:] if tagged else location
    return [member for argument in tagged or arguments for member in _members(argument, rest)]


def _tag(annotation: Any) -> Any:
    if (
        isinstance(annotation, type)
        and issubclass(annotation, BaseModel)
        and "kind" in annotation.model_fields
    ):
        return annotation.model_fields["kind"].default
    return None
