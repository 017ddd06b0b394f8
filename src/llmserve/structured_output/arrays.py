# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Arrays in the normal form."""

import math
from typing import Any

from llmserve.structured_output.complement import Complement
from llmserve.structured_output.document import Node
from llmserve.structured_output.normal_form import (
    NEVER,
    Merger,
    Normal,
    Schema,
    values_of,
    visible,
)
from llmserve.structured_output.values import identity

_MAX_CONTAINED = 64
_MAX_LISTED = 300  # arrays that are written out one by one

Slots = list[list[tuple[Node, Node]]]  # by index: who asks for what there, by contains


def array_of(merger: Merger, nodes: list[Node]) -> list[Schema]:
    """The arrays under all of `nodes`. What they have to contain comes first, one after the other
    or, where that is too long, at the same places."""
    counts = [] if merger.exact else [(n, _count(merger, n)) for n in nodes if "contains" in n.raw]
    row: Slots = [[(n, n.child("contains"))] for n, count in counts for _ in range(count)]
    found = _array(merger, nodes, row)
    if not found and len(counts) > 1:
        row = [
            [(n, n.child("contains")) for n, count in counts if index < count]
            for index in range(max(count for _, count in counts))
        ]
        found = _array(merger, nodes, row)
    if not found:
        merger.none(nodes, "minItems", "maxItems", "contains")
    return found


def _count(merger: Merger, node: Node) -> int:
    count = int(node.raw.get("minContains", 1))
    if count > _MAX_CONTAINED:
        merger.drop(f"{node.pointer}/minContains", f"it is more than {_MAX_CONTAINED}")
    return min(count, _MAX_CONTAINED)


def _array(merger: Merger, nodes: list[Node], slots: Slots) -> list[Schema]:
    low = max((int(node.raw.get("minItems", 0)) for node in nodes), default=0)
    high = min((node.raw.get("maxItems", math.inf) for node in nodes), default=math.inf)
    low = max(low, len(slots))
    others = dict[str, Node]()
    for node in nodes:
        if "contains" in node.raw and "maxContains" in node.raw and not merger.exact:
            options = Complement(node.child("contains")).options
            if node.raw["maxContains"] < sum(n is node for slot in slots for n, _ in slot):
                return []
            if options:
                others[node.name] = node.made({"anyOf": options})
            else:
                high = min(high, node.raw["maxContains"])  # fewer than may be, but no more
    length = max([len(_prefix(node)) for node in nodes] + [len(slots)])
    prefix: list[Schema] = []
    for index in range(length):
        item = merger.normal(_items(merger, nodes, slots, others, index))
        if item is NEVER:
            high = min(high, index)
            break
        assert isinstance(item, dict)
        prefix.append(item)
    rest = merger.normal(_items(merger, nodes, slots, others, length))
    if rest is NEVER:
        high = min(high, len(prefix))
    if low > high:
        return []
    if any(node.raw.get("uniqueItems") is True for node in nodes) and high > 1 and not merger.exact:
        listed = _unique(merger, nodes, prefix, rest, low, high)
        if listed is not None:
            return listed
    result: Schema = {"type": "array"}
    if high <= len(prefix):
        prefix, rest = prefix[: int(high)], NEVER
    if prefix:
        result["prefixItems"] = prefix
        merger.mark(nodes, "prefixItems", "items")
    result["items"] = rest
    if low:
        result["minItems"] = low
    if high < math.inf:
        result["maxItems"] = int(high)
    return [result]


def _prefix(node: Node) -> list[Node]:
    """The schemas of an array's first items."""
    keyword = "items" if isinstance(node.raw.get("items"), list) else "prefixItems"
    return [node.child(keyword, i) for i in range(len(node.raw.get(keyword, ())))]


def _items(
    merger: Merger, nodes: list[Node], slots: Slots, others: dict[str, Node], index: int
) -> list[Node]:
    """All that the item at `index` must be."""
    here = slots[index] if index < len(slots) else []
    found = [child for _, child in here]
    for node in nodes:
        if (part := _item(merger, nodes, here, node, index)) is not None:
            found.append(part)
        if node.name in others and not any(n is node for n, _ in here):
            found.append(others[node.name])
    return found


def _item(
    merger: Merger, nodes: list[Node], here: list[tuple[Node, Node]], node: Node, index: int
) -> Node | None:
    """What `node` says of the item at `index`, contains aside."""
    prefix, raw = _prefix(node), node.raw
    if index < len(prefix):
        return prefix[index]
    keyword = "additionalItems" if isinstance(raw.get("items"), list) else "items"
    if keyword in raw:
        return node.child(keyword)
    if "unevaluatedItems" not in raw or merger.exact:
        return None
    options = [node.child("unevaluatedItems")]
    for other in visible(nodes, node):
        own = other.raw
        if (
            index < len(_prefix(other))
            or isinstance(own.get("items"), dict | bool)
            or "additionalItems" in own
            or ("unevaluatedItems" in own and other is not node)
            or any(n is other for n, _ in here)
        ):
            return None
        if "contains" in own:
            options.append(other.child("contains"))
    return options[0] if len(options) == 1 else node.made({"anyOf": options})


def _unique(
    merger: Merger,
    nodes: list[Node],
    prefix: list[Schema],
    rest: Normal,
    low: int,
    high: float,
) -> list[Schema] | None:
    """Arrays without two equal items: all that have few enough, where the items are from a list;
    the last item may be one of many. None where none can be told to be equal."""
    place = next(n.pointer for n in nodes if n.raw.get("uniqueItems") is True) + "/uniqueItems"
    arrays: list[list[Any]] = [[]]
    listed = [[]] if low == 0 else list[list[Any]]()
    found: list[Schema] = []
    length = 0
    while arrays and length < high:
        item: Normal = prefix[length] if length < len(prefix) else rest
        values = values_of(item, merger.seen)
        length += 1
        if values is None:
            if len(prefix) <= length - 1 and length < 2:
                break
            for array in arrays if low <= length else ():
                if _is_unlike(merger.seen(item), array):
                    parts = [{"enum": [value]} for value in array] + [item]
                    found.append({"type": "array", "prefixItems": parts, "items": NEVER,
                                  "minItems": length, "maxItems": length})  # fmt: skip
            break
        arrays = [
            [*array, value] for array in arrays for value in values
            if identity(value) not in set(map(identity, array))
        ]  # fmt: skip
        if len(listed) + len(arrays) > _MAX_LISTED:
            break
        listed += arrays if length >= low else []
    if max([len(array) for array in listed] + [len(p["prefixItems"]) for p in found] + [0]) < 2:
        merger.drop(place, "its items are not from a short list")
        return None
    merger.mark(nodes, "uniqueItems")
    return [{"enum": listed}, *found] if listed else found


def _is_unlike(item: Normal, values: list[Any]) -> bool:
    """Whether none of `values` is of the item's type."""
    kind = item.get("type") if isinstance(item, dict) else None
    same = {"string": str, "array": list, "object": dict}.get(str(kind))
    return same is not None and not any(isinstance(value, same) for value in values)
