# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Numbers and strings in the normal form."""

import math
import re
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

from llmserve.errors import GrammarError
from llmserve.structured_output.document import Node
from llmserve.structured_output.normal_form import Merger, Schema
from llmserve.structured_output.regex import ascii_classes, not_regular
from llmserve.structured_output.regular import combine

_LABEL = "[a-z0-9](?:[a-z0-9-]{0,20}[a-z0-9])?"
_DATE = r"\d{4}-(?:0[1-9]|1[0-2])-(?:0[1-9]|1\d|2[0-8])"
_TIME = r"(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d+)?(?:Z|[+-](?:[01]\d|2[0-3]):[0-5]\d)"
_BYTE = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
# Each with a pattern of the ordinary ones, for where an engine knows no formats
FORMATS = {
    "date-time": f"^{_DATE}T{_TIME}$",
    "time": f"^{_TIME}$",
    "date": f"^{_DATE}$",
    "duration": r"^P(?:\d+W|\d+D(?:T\d+H)?|T\d+[HMS])$",
    "email": rf"^[A-Za-z0-9_]+(?:\.[A-Za-z0-9_]+)*@{_LABEL}(?:\.{_LABEL})+$",
    "hostname": rf"^{_LABEL}(?:\.{_LABEL})*$",
    "ipv4": rf"^{_BYTE}(?:\.{_BYTE}){{3}}$",
    "ipv6": "^(?:[0-9a-f]{1,4}:){7}[0-9a-f]{1,4}$",
    "uuid": "^[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}$",
    "uri": rf"^[a-z][a-z0-9+.-]*://{_LABEL}(?:\.{_LABEL})*(?::\d{{1,4}})?(?:/[A-Za-z0-9._~-]*)*$",
}
_BOUNDS = (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum"))
_MAX_FACTOR = 20_000  # apart from 2 and 5: an engine keeps a state for each remainder
_Edge = tuple[float, bool]  # a bound, and whether it is left out itself


def numbers_of(merger: Merger, kind: str, nodes: list[Node]) -> list[Schema]:
    """The numbers under all of `nodes`, several ranges where single ones are left out."""
    low, high = _edges(nodes)
    factor = _factor(merger, kind, nodes)
    refused = {v for n in nodes for v in n.raw.get("~not", ())
               if isinstance(v, int | float) and not isinstance(v, bool)}  # fmt: skip
    found: list[Schema] = []
    for gap in [*sorted(refused), math.inf]:
        upper = min(high, (gap, True), key=lambda edge: (edge[0], not edge[1]))
        if (part := _range(kind, low, upper)) is not None:
            found.append(part | ({} if factor is None else {"multipleOf": factor}))
        low = max(low, (gap, True))
    if not found:
        merger.none(nodes, "minimum", "maximum")
    if factor is not None:
        merger.mark(nodes, "multipleOf")
    return found


def _edges(nodes: list[Node]) -> tuple[_Edge, _Edge]:
    low: _Edge = (-math.inf, False)
    high: _Edge = (math.inf, False)
    for node in nodes:
        raw = node.raw
        for keyword, opened in _BOUNDS:
            bounds: list[_Edge] = []
            if keyword in raw:
                bounds.append((raw[keyword], raw.get(opened) is True))  # draft 4's boolean
            if opened in raw and not isinstance(raw[opened], bool):
                bounds.append((raw[opened], True))
            for bound, is_open in bounds:
                if keyword == "minimum":
                    low = max(low, (bound, is_open))
                else:
                    high = min(high, (bound, is_open), key=lambda edge: (edge[0], not edge[1]))
    return low, high


def _range(kind: str, low_edge: _Edge, high_edge: _Edge) -> Schema | None:
    (low, low_open), (high, high_open) = low_edge, high_edge
    if kind == "integer":
        if low > -math.inf:
            low, low_open = math.floor(low) + 1 if low_open else math.ceil(low), False
        if high < math.inf:
            high, high_open = math.ceil(high) - 1 if high_open else math.floor(high), False
    if low > high or (low == high and (low_open or high_open)):
        return None
    result: Schema = {"type": kind}
    if low > -math.inf:
        result["exclusiveMinimum" if low_open else "minimum"] = low
    if high < math.inf:
        result["exclusiveMaximum" if high_open else "maximum"] = high
    return result


def _factor(merger: Merger, kind: str, nodes: list[Node]) -> Any:
    """The least number whose multiples are the multiples of all."""
    factors = [Fraction(str(n.raw["multipleOf"])) for n in nodes if "multipleOf" in n.raw]
    if not factors:
        return None
    top, bottom = factors[0].numerator, factors[0].denominator
    for factor in factors[1:]:
        top, bottom = math.lcm(top, factor.numerator), math.gcd(bottom, factor.denominator)
    if kind == "integer":
        bottom = 1
    hard = top
    for prime in (2, 5):
        while hard % prime == 0:
            hard //= prime
    if hard > _MAX_FACTOR:
        place = next(n.pointer for n in nodes if "multipleOf" in n.raw)
        merger.drop(f"{place}/multipleOf", f"but for tens, {hard} is more than {_MAX_FACTOR}")
        return None
    return top if bottom == 1 else top / bottom


def strings_of(merger: Merger, nodes: list[Node]) -> Schema | None:
    """The strings under all of `nodes`."""
    result: Schema = {"type": "string"}
    low = max((int(node.raw.get("minLength", 0)) for node in nodes), default=0)
    high = min((node.raw.get("maxLength", math.inf) for node in nodes), default=math.inf)
    if low > high:
        merger.none(nodes, "minLength", "maxLength")
        return None
    if low:
        result["minLength"] = low
    if high < math.inf:
        result["maxLength"] = int(high)
    patterns = enforceable(
        merger, ((n.raw["pattern"], f"{n.pointer}/pattern") for n in nodes if "pattern" in n.raw)
    )
    unlike = list(dict.fromkeys(p for n in nodes for p in n.raw.get("~unlike", ())))
    values = dict.fromkeys(
        v for n in nodes for v in n.raw.get("~not", ())
        if isinstance(v, str) and low <= len(v) <= high
    )  # fmt: skip
    if values:
        unlike.append(f"^(?:{'|'.join(map(re.escape, values))})$")
    if unlike and not merger.exact:
        try:
            found = _without(merger, patterns, unlike)
        except GrammarError as error:
            by_value = [n.pointer for n in nodes if "~not" in n.raw]
            place = next((f"{n.pointer}/pattern" for n in nodes if "~unlike" in n.raw), "")
            merger.drop(place or by_value[0], error.message)
            found = patterns
        if found is None:
            return None
        patterns = found
    patterns = [ascii_classes(pattern) for pattern in patterns]
    formats = list(dict.fromkeys(f for n in nodes if (f := n.raw.get("format")) in FORMATS))
    patterns += [FORMATS[name] for name in formats[1:]]
    if patterns:
        result["pattern"] = patterns[0]
    if formats:
        result["format"] = formats[0]
    if len(result) > (2 if formats else 1):
        weak = bool(patterns or formats)
        merger.mark(nodes, "minLength", "maxLength", "pattern", weak=weak)
    if len(patterns) > 1:
        return {"allOf": [result, *({"type": "string", "pattern": p} for p in patterns[1:])]}
    return result


def enforceable(merger: Merger, found: Iterable[tuple[str, str]]) -> list[str]:
    """Of patterns, each with its place, those that an engine can enforce."""
    kept: dict[str, None] = {}
    for pattern, place in found:
        if (why := not_regular(pattern)) is None:
            kept[pattern] = None
        else:
            merger.drop(place, why)
    return list(kept)


def _without(merger: Merger, patterns: list[str], unlike: list[str]) -> list[str] | None:
    """Patterns of the texts that match all of `patterns` and none of `unlike`; None for none."""
    count = len(patterns)
    found = combine(
        patterns + unlike, lambda flags: all(flags[:count]) and not any(flags[count:]), merger.tick
    )
    return None if found is None else [found]
