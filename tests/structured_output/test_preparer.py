# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What takes long is prepared elsewhere, and comes back as `prepare` gives it."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from llmserve.core.structured_outputs import StructuredOutputsParams
from llmserve.errors import OverloadedError, RequestError
from llmserve.structured_output import preparer as module
from llmserve.structured_output.prepare import prepare
from llmserve.structured_output.preparer import Preparer
from tests.helpers.clock import calibrate
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
def preparer() -> Iterator[Preparer]:
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


async def test_the_event_loop_goes_on(preparer: Preparer) -> None:
    await preparer.prepare(large(), "auto")
    gaps, end = [0.0], asyncio.ensure_future(preparer.prepare(params(json=RECURSIVE), "auto"))
    while not end.done():
        began = time.monotonic()
        await asyncio.sleep(0.001)
        gaps.append(time.monotonic() - began)
    assert isinstance(end.exception(), RequestError)
    assert sorted(gaps)[int(len(gaps) * 0.9)] < 0.005 * calibrate(), "a thread has the lock"


async def test_one_that_waited_too_long_may_try_again(
    preparer: Preparer, monkeypatch: pytest.MonkeyPatch
) -> None:
    await preparer.prepare(large(), "auto")
    monkeypatch.setattr(module, "SECONDS", 0.3)
    asked = [params(json=RECURSIVE | {"title": f"{i}"}) for i in range(8)]
    began = time.monotonic()
    ends = await asyncio.gather(
        *(preparer.prepare(each, "auto") for each in asked), return_exceptions=True
    )
    assert time.monotonic() - began < 0.8 * calibrate()
    assert all(isinstance(end, RequestError | OverloadedError) for end in ends)
    assert any(isinstance(end, OverloadedError) for end in ends)
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
