# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What takes long is prepared elsewhere, and comes back as `prepare` gives it."""

import asyncio
import json
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from llmserve.core.structured_outputs import GrammarSpec, StructuredOutputsParams
from llmserve.errors import OverloadedError, RequestError
from llmserve.structured_output import preparer as module
from llmserve.structured_output.prepare import prepare
from llmserve.structured_output.preparer import Preparer
from llmserve.structured_output.schema import MAX_SECONDS
from tests.helpers.clock import in_time
from tests.helpers.server import is_alive

RECURSIVE = {
    "$defs": {"a": {"oneOf": [{"$ref": "#/$defs/a"}, {"type": "array", "items": {"$ref": "#"}}]}},
    "$ref": "#/$defs/a",
}


def params(**fields: Any) -> StructuredOutputsParams:
    return StructuredOutputsParams(param="the_field", **fields)


def large(kind: str = "integer", **keywords: Any) -> StructuredOutputsParams:
    """The dropped keyword is named in `ignored`."""
    properties = {f"p{i}": {"type": kind} | keywords for i in range(1000)}
    return params(json={"type": "object", "properties": properties}, strict=False)


@pytest.fixture
def preparer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Preparer]:
    monkeypatch.setattr(module, "SECONDS", 20.0)  # forks give way to whatever else runs here
    made = Preparer()
    yield made
    made.close()


async def test_small_ones_need_no_child(preparer: Preparer) -> None:
    for small in (params(json={"const": 2**70}), params(regex="[0-9]+")):
        assert await preparer.prepare(small, "auto") == prepare(small, "auto")
    with pytest.raises(RequestError):
        await preparer.prepare(params(json={"not": {}}), "auto")
    assert preparer._forks.child is None


@pytest.mark.parametrize(
    "asked",
    [
        large(),
        large("string", format="nonsense"),
        large(maximum=2**70),
        large("number", minimum=1e-9),
    ],
)
async def test_large_ones_come_back_the_same(
    preparer: Preparer, asked: StructuredOutputsParams
) -> None:
    assert await preparer.prepare(asked, "auto") == prepare(asked, "auto")
    assert preparer._forks.child is not None


@pytest.mark.parametrize("asked", [large("nonsense"), params(json=RECURSIVE)])
async def test_errors_come_back_the_same(
    preparer: Preparer, asked: StructuredOutputsParams
) -> None:
    """Of the small one that takes long too."""
    with pytest.raises(RequestError) as expected:
        prepare(asked, "auto")
    with pytest.raises(RequestError) as raised:
        await preparer.prepare(asked, "auto")
    for name in ("message", "param", "code", "status"):
        assert getattr(raised.value, name) == getattr(expected.value, name)
    assert preparer._forks.child is not None


async def test_what_was_asked_for_before_is_there(preparer: Preparer) -> None:
    """In this process, and of what a fork made."""

    def made(backend: str = "auto", **fields: Any) -> GrammarSpec:
        return preparer.prepare_here(params(**fields), backend)

    schema = {"properties": {"a": {"type": "integer"}, "b": {}}}
    first = made(json=schema)
    assert made(json=json.loads(json.dumps(schema))) is first
    turned = {"properties": dict(reversed(schema["properties"].items()))}
    for other in (
        {"json": turned},
        {"json": schema, "strict": False},
        {"json": json.dumps(schema)},
    ):
        assert made(**other) is not first
    assert made("guidance", json=schema).backend == "guidance"
    for _ in range(2):
        with pytest.raises(RequestError, match="the_field"):
            made(json={"type": "nonsense"})
    assert len({id(made(json={"maxLength": n, "type": "string"})) for n in range(300)}) > 1
    assert made(json=schema) == first

    middling = params(json={"enum": [f"{n}" + "x" * 20 for n in range(400)]})
    forked = await preparer.prepare(middling, "auto")
    assert preparer._forks.child is not None
    assert await preparer.prepare(middling, "auto") is forked
    assert preparer.prepare_here(middling, "auto") is forked


async def test_little_is_done_in_the_process_of_the_event_loop(
    preparer: Preparer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def seen(params: StructuredOutputsParams, backend: str, seconds: float) -> GrammarSpec:
        asked.append(seconds)
        return prepare(params, backend, seconds)

    monkeypatch.setattr(module, "prepare", seen)
    used = time.process_time()
    await preparer.prepare(large(), "auto")
    assert asked == []
    with pytest.raises(RequestError):
        await preparer.prepare(params(json=RECURSIVE), "auto")
    assert asked == [module._QUICK_S] and module._QUICK_S < MAX_SECONDS / 10
    in_time(time.process_time() - used, MAX_SECONDS / 2)


async def test_one_that_waited_too_long_may_try_again(
    preparer: Preparer, monkeypatch: pytest.MonkeyPatch
) -> None:
    await preparer.prepare(large(), "auto")
    monkeypatch.setattr(module, "SECONDS", 0.3)
    asked = [params(json=RECURSIVE | {"title": f"{i}"}) for i in range(8)]
    ends = await asyncio.gather(
        *(preparer.prepare(each, "auto") for each in asked), return_exceptions=True
    )
    assert all(isinstance(end, RequestError | OverloadedError) for end in ends)
    assert any(isinstance(end, OverloadedError) for end in ends)
    monkeypatch.setattr(module, "SECONDS", 20.0)
    assert (await preparer.prepare(large(), "auto")).kind == "json"


async def test_a_child_that_ends_fails_what_it_did(preparer: Preparer) -> None:
    await preparer.prepare(large(), "auto")
    assert preparer._forks.child is not None
    asked = asyncio.ensure_future(preparer.prepare(params(json=RECURSIVE), "auto"))
    await asyncio.sleep(0.1)
    os.killpg(preparer._forks.child.process.pid, signal.SIGKILL)
    with pytest.raises(OverloadedError):
        await asked
    assert (await preparer.prepare(large(), "auto")).kind == "json"


async def test_a_child_that_died_is_started_again(preparer: Preparer) -> None:
    await preparer.prepare(large(), "auto")
    assert preparer._forks.child is not None
    pid = preparer._forks.child.process.pid
    os.kill(pid, signal.SIGKILL)
    preparer._forks.child.process.wait()
    assert (await preparer.prepare(large(), "auto")).kind == "json"
    again = preparer._forks.child.process.pid
    preparer.close()
    preparer.close()
    assert not is_alive(pid) and not is_alive(again)
