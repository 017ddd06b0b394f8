# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""JSON values as JSON schema sees them: true is not 1, but 1.0 is."""

import math
from collections.abc import Collection, Hashable, Iterable
from typing import Any

_KINDS: dict[str, tuple[type, ...]] = {
    "null": (type(None),),
    "boolean": (bool,),
    "number": (int, float),
    "string": (str,),
    "array": (list,),
    "object": (dict,),
}


def identity(value: Any) -> Hashable:
    """Equal for the same JSON value, and for no other."""
    if isinstance(value, list):
        return tuple(map(identity, value))
    if isinstance(value, dict):
        return frozenset((key, identity(part)) for key, part in value.items())
    return (bool, value) if isinstance(value, bool) else value


def unique(values: Iterable[Any]) -> list[Any]:
    """Without repetitions."""
    return list({identity(value): value for value in reversed(list(values))}.values())[::-1]


def without(values: list[Any], others: list[Any]) -> list[Any]:
    """Those that are not among `others`."""
    out = set(map(identity, others))
    return [value for value in values if identity(value) not in out]


def common(values: list[Any], others: list[Any]) -> list[Any]:
    """Those that are among `others`."""
    kept = set(map(identity, others))
    return [value for value in values if identity(value) in kept]


def same_kind(value: Any, types: Collection[str]) -> bool:
    """Whether `value` is of one of the JSON schema `types`."""
    if isinstance(value, bool):
        return "boolean" in types
    if isinstance(value, int | float):
        return "number" in types or ("integer" in types and value == math.floor(value))
    return any(isinstance(value, _KINDS[name]) for name in types if name in _KINDS)


def scalar_fits(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a number or string keeps the bounds of `schema`; other values and patterns are not
    looked at."""
    if isinstance(value, str):
        return schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", math.inf)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return True
    low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    if above is True:
        above = low
    if below is True:
        below = high
    factor = schema.get("multipleOf")
    return (
        low <= value <= high
        and (above is None or above is False or value > above)
        and (below is None or below is False or value < below)
        and (factor is None or (value / factor) == math.floor(value / factor))
    )
