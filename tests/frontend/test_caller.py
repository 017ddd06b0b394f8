# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import asyncio

from llmserve.frontend.caller import CALLER, Caller


def test_salts_of_callers_and_requests_are_all_told_apart() -> None:
    pairs = [(caller, own) for caller in (b"", b"a", b"ab") for own in ("", "b", "ab", "bb")]
    salted = [Caller(salt=caller).salted(own) for caller, own in pairs]
    assert len(set(salted)) == len(pairs)
    assert [Caller().salted(own) for own in ("", "x")] == ["", "x"]


def test_a_caller_may_go_later_but_not_sooner() -> None:
    assert [Caller().bounded(p) for p in (-5, 5)] == [-5, 5]
    assert [Caller(least_priority=0).bounded(p) for p in (-5, 0, 5)] == [0, 0, 5]


async def test_tasks_of_a_request_see_its_caller_alone() -> None:
    async def request(tenant: int) -> int:
        CALLER.set(Caller(tenant=tenant))
        await asyncio.sleep(0)
        return (await asyncio.create_task(look())).tenant

    async def look() -> Caller:
        return CALLER.get()

    tasks = [asyncio.create_task(request(tenant)) for tenant in range(1, 4)]
    assert [await task for task in tasks] == [1, 2, 3]
    assert CALLER.get() == Caller()
