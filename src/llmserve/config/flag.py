# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""A config field is its flag: default, help and check stand in one place.

`flag` makes a dataclass field; `FlagInfo` is what cli/ and tests read back from it. Values are
checked by `check_all` when a group is built, whether they came from a command line, a YAML file or
Python keywords.
"""

import dataclasses
import re
import types
import typing
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from llmserve.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class FlagInfo:
    """What the command line needs beyond the field's name, type and default."""

    help: str
    check: Callable[[Any], str | None] | None = None  # the complaint, or None
    choices: tuple[str, ...] | None = None
    short: str | None = None  # "-tp"
    parse: Callable[[str], Any] | None = None  # from one command-line word; default by type
    repeat: bool = False  # takes several words, and may be given several times


def flag(
    default: Any,
    help: str,
    *,
    check: Callable[[Any], str | None] | None = None,
    choices: tuple[str, ...] | None = None,
    short: str | None = None,
    parse: Callable[[str], Any] | None = None,
    repeat: bool = False,
) -> Any:
    """A dataclass field that is also a command-line flag. Mutable defaults are copied."""
    info = FlagInfo(help, check, choices, short, parse, repeat)
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=default.copy, metadata={"flag": info})
    return dataclasses.field(default=default, metadata={"flag": info})


def flag_name(field_name: str) -> str:
    """`max_num_seqs` -> `--max-num-seqs`."""
    return "--" + field_name.replace("_", "-")


_KINDS = {
    int: "a whole number of 64 bits", float: "a number", bool: "true or false", str: "text",
    list: "a list", dict: "a JSON object",
}  # fmt: skip


def _is(value: Any, kind: Any) -> bool:
    origin, arms = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return any(_is(value, arm) for arm in arms)
    if origin is list:
        return isinstance(value, list) and all(_is(item, arms[0]) for item in value)
    if kind is int:
        return type(value) is int and -(2**63) <= value < 2**63
    if kind is float:
        return type(value) in (int, float)
    return isinstance(value, origin or kind)


def _kind_name(kind: Any) -> str:
    arms = [arm for arm in typing.get_args(kind) if arm is not types.NoneType]
    if isinstance(kind, types.UnionType):
        return _kind_name(arms[0])
    name = _KINDS[typing.get_origin(kind) or kind]
    return f"{name} of which each is {_KINDS[arms[0]]}" if name == "a list" else name


def check_all(group: Any) -> None:
    """Raises ConfigError for the first field of a config dataclass whose value is of another type,
    as it may be from Python, or that its check refuses."""
    hints = typing.get_type_hints(type(group))
    for field in dataclasses.fields(group):
        info: FlagInfo | None = field.metadata.get("flag")
        value = getattr(group, field.name)
        if info is None:
            continue
        if not _is(value, kind := hints[field.name]):
            name = flag_name(field.name)
            raise ConfigError(f"{name} must be {_kind_name(kind)}, got {value!r}")
        if value is None:
            continue
        empty = "" in value if isinstance(value, list) else value == ""
        if empty and field.default != "":  # as of a shell's variable that is not set
            raise ConfigError(f"{flag_name(field.name)} must not be empty, got {value!r}")
        if info.choices and value not in info.choices:
            raise ConfigError(
                f"{flag_name(field.name)} must be one of {', '.join(info.choices)}, got {value!r}"
            )
        if info.check and (complaint := info.check(value)):
            raise ConfigError(f"{flag_name(field.name)} {complaint}, got {value!r}")


def positive(value: float) -> str | None:
    """Check: at least 1."""
    return None if value >= 1 else "must be at least 1"


def not_negative(value: float) -> str | None:
    """Check: at least 0."""
    return None if value >= 0 else "must not be negative"


def up_to(most: int) -> Callable[[int], str | None]:
    """Check: a count of at most `most`."""
    return lambda value: None if 1 <= value <= most else f"must be from 1 to {most}"


def fraction(value: float) -> str | None:
    """Check: in (0, 1]."""
    return None if 0 < value <= 1 else "must be above 0 and at most 1"


_SIZE = re.compile(r"(\d+(?:\.\d+)?)([kKmMgGtT]?)(i?[bB])?")


def size(text: str) -> int:
    """`4096`, `16k` (16,000), `1.5m`, `70GiB` -> int.

    `KiB` to `TiB` are powers of 1,024 and so, as in vLLM, is a single capital letter: `16K` is
    16,384. Lower case letters and `kB` to `TB` are powers of 1,000.
    """
    match = _SIZE.fullmatch(text)
    if not match or (match[3] and not match[2]):
        raise ConfigError(f"not a size: {text!r} (examples: 4096, 16k, 70GiB)")
    number, letter, suffix = match.groups()
    binary = suffix.startswith("i") if suffix else letter.isupper()
    factor = (1024 if binary else 1000) ** ("kmgt".index(letter.lower()) + 1 if letter else 0)
    return int(Fraction(number) * factor)
