# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""AsyncLLM on a scripted engine."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from llmserve.core.messages import (
    EngineFailed,
    EngineLost,
    EngineReady,
    EngineRequest,
    ModelInfo,
    RequestExtra,
    SchedulerStats,
    UtilityCall,
    UtilityResult,
)
from llmserve.core.outputs import RequestOutput
from llmserve.core.sampling_params import SamplingParams
from llmserve.errors import ConfigError, EngineDeadError, EngineError, OverloadedError, RequestError
from llmserve.frontend import async_llm
from llmserve.frontend.async_llm import AsyncLLM
from llmserve.frontend.input_processor import InputProcessor
from tests.helpers.frontend import FakeClient, byte_level, model_info, step, write_sentencepiece

TOKENIZER = byte_level()
DONE = RequestExtra(finish_reason="length")


def build(client: FakeClient) -> AsyncLLM:
    info = model_info()
    front = InputProcessor(info, TOKENIZER, None, max_logprobs=20, default_template_kwargs={})
    llm = AsyncLLM(client, info, tokenizer=TOKENIZER, input_processor=front)  # type: ignore[arg-type]
    llm.start()
    return llm


@pytest.fixture
def client() -> FakeClient:
    return FakeClient()


@pytest.fixture
async def llm(client: FakeClient) -> AsyncIterator[AsyncLLM]:
    llm = build(client)
    yield llm
    llm.shutdown()
    client.close()


async def settle() -> None:
    """Lets the loop look at the descriptor and run who was woken."""
    for _ in range(4):
        await asyncio.sleep(0)


async def test_deltas_merge_until_somebody_looks(llm: AsyncLLM, client: FakeClient) -> None:
    stream = await llm.submit([5], SamplingParams(n=2), request_id="r", priority=2, cache_salt="s")
    a, b = (message.request_id for message in client.requests)
    assert {(m.priority, m.cache_salt) for m in client.requests} == {(2, "s")}
    reader = asyncio.create_task(stream.next())
    await settle()
    assert not reader.done()
    client.put(step([(a, 100), (b, 101)]), step([(a, 102)]))
    assert [(d.index, d.token_ids) for d in await reader] == [(0, [100, 102]), (1, [101])]
    client.put(step([(b, 103)], {a: DONE}))
    await settle()
    client.put(step([], {b: DONE}, SchedulerStats(num_running=9)))
    await settle()
    deltas = {d.index: d for d in await stream.next()}
    assert deltas[1].token_ids == [103]
    assert [deltas[i].finish_reason for i in (0, 1)] == ["length", "length"]
    assert stream.finished and await stream.next() == []
    assert llm.stats.num_running == 9 and llm.num_unfinished == 0


async def test_messages_that_came_before_start_are_seen(client: FakeClient) -> None:
    client.put(step([], stats=SchedulerStats(num_waiting=2)))
    llm = build(client)
    assert llm.stats.num_waiting == 2
    llm.shutdown()


async def test_iterating_a_stream(llm: AsyncLLM, client: FakeClient) -> None:
    ids = TOKENIZER.encode("the cat 日本")
    stream = await llm.submit([5], SamplingParams(max_tokens=50), request_id="r")
    (wire,) = (m.request_id for m in client.requests)

    async def engine() -> None:
        for token in ids:
            client.put(step([(wire, token)]))
            await asyncio.sleep(0)
        client.put(step([], {wire: DONE}))

    task = asyncio.create_task(engine())
    text = ""
    async for deltas in stream:
        text += "".join(delta.text for delta in deltas)
    assert text == "the cat 日本"
    await task


async def test_a_stream_of_which_too_much_waits_ends(llm: AsyncLLM, client: FakeClient) -> None:
    """It says how much may wait, and blames nobody: the reader or our own writing may be slow."""
    stream = await llm.submit([5], SamplingParams(max_tokens=20_000), request_id="r")
    stream.bound(1)
    most = stream._request.max_held_bytes
    assert most is not None
    (wire,) = (m.request_id for m in client.requests)
    for _ in range(100):
        client.put(*(step([(wire, 100)] * 100) for _ in range(2)))
        await settle()
    with pytest.raises(EngineError, match=rf"\d+ bytes of it wait, {most} may\.") as caught:
        await stream.next()
    assert caught.value.code == "slow_reader" and llm.num_unfinished == 0


async def test_generate_is_cumulative(llm: AsyncLLM, client: FakeClient) -> None:
    ids = TOKENIZER.encode("the cat")

    def answer(message: object) -> None:
        if isinstance(message, EngineRequest):
            client.put(*(step([(message.request_id, t)]) for t in ids[:-1]))
            asyncio.get_running_loop().call_later(
                0.01, client.put, step([(message.request_id, ids[-1])], {message.request_id: DONE})
            )

    client.on_send = answer
    outputs: list[tuple[str, bool]] = []
    async for output in llm.generate("mat", SamplingParams(max_tokens=90 - 27), "r"):
        outputs.append((output.outputs[0].text, output.finished))
    assert outputs[-1] == ("the cat", True) and len(outputs) == 2
    assert outputs[-1][0].startswith(outputs[0][0])
    assert (output.prompt, output.prompt_token_ids) == ("mat", TOKENIZER.encode("mat"))
    assert client.requests[0].params.max_tokens == min(63, 64 - len(output.prompt_token_ids))
    with pytest.raises(RequestError, match="400"):
        await anext(llm.generate([400], SamplingParams(), "r"))


async def test_leaving_generate_aborts(llm: AsyncLLM, client: FakeClient) -> None:
    generator = llm.generate([5], SamplingParams(), "r")
    first = asyncio.create_task(anext(generator))
    await settle()
    (wire,) = (m.request_id for m in client.requests)
    client.put(step([(wire, 100)]))
    assert (await first).outputs[0].token_ids == [100]
    await generator.aclose()  # type: ignore[attr-defined]
    assert client.aborted == [wire] and llm.num_unfinished == 0


async def test_abort_from_outside_ends_generate(llm: AsyncLLM, client: FakeClient) -> None:
    async def run() -> list[RequestOutput]:
        return [output async for output in llm.generate([5], SamplingParams(n=2), "r")]

    task = asyncio.create_task(run())
    await settle()
    llm.abort("unknown")
    llm.abort("r")
    assert await task == []
    assert client.aborted == [m.request_id for m in client.requests]


async def test_cancelled_reader_leaves_the_stream_usable(llm: AsyncLLM, client: FakeClient) -> None:
    stream = await llm.submit([5], SamplingParams(), request_id="r")
    (wire,) = (m.request_id for m in client.requests)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(stream.next(), 0.01)
    client.put(step([(wire, 100)]))
    assert (await stream.next())[0].token_ids == [100]
    stream.abort()
    assert client.aborted == [wire] and await stream.next() == []


async def test_errors_reach_the_reader(llm: AsyncLLM, client: FakeClient) -> None:
    stream = await llm.submit([5], SamplingParams(), request_id="r")
    (wire,) = (m.request_id for m in client.requests)
    reader = asyncio.create_task(stream.next())
    await settle()
    error = RequestExtra(finish_reason="error", error="server_is_overloaded", message="full")
    client.put(step([], {wire: error}))
    with pytest.raises(OverloadedError, match="full"):
        await reader


async def test_engine_death(llm: AsyncLLM, client: FakeClient) -> None:
    stream = await llm.submit([5], SamplingParams(), request_id="r")
    (wire,) = (m.request_id for m in client.requests)
    call = asyncio.create_task(llm.call("ping"))
    await settle()
    client.put(step([(wire, 100)]), EngineFailed("it fell over", False))
    with pytest.raises(EngineDeadError, match="fell over"):
        await stream.next()
    with pytest.raises(EngineDeadError, match="fell over"):
        await call
    assert isinstance(llm.dead, EngineDeadError)
    with pytest.raises(EngineDeadError):
        await llm.submit([5], SamplingParams(), request_id="r2")


async def test_a_lost_engine_keeps_what_had_not_begun(llm: AsyncLLM, client: FakeClient) -> None:
    """It is sent to the next engine once more, in its order; the rest hears of it."""
    streams = [await llm.submit([5, n], SamplingParams(), request_id=str(n)) for n in range(3)]
    client.put(step([(client.requests[1].request_id, 100)]))
    await settle()
    old = [request.request_id for request in client.requests]
    client.put(EngineFailed("it fell over", False, engine=0))
    await settle()
    with pytest.raises(EngineDeadError, match="restarted"):  # its own words are for the log
        await llm.submit([5], SamplingParams(), request_id="new")
    client.put(EngineLost("the engine process ended", 1))
    await settle()
    with pytest.raises(EngineDeadError) as info:
        await asyncio.wait_for(streams[1].next(), 10)
    assert info.value.code == "engine_restarted"
    again = client.requests[3:]
    assert [request.prompt_token_ids.tolist() for request in again] == [[5, 0], [5, 2]]
    assert not {request.request_id for request in again} & set(old)
    assert client.engine == llm.num_restarts == 1
    assert llm.lost is not None and llm.lost.code == "engine_dead"
    client.put(EngineReady(llm.model, 0))  # late word of the first one
    await settle()
    assert llm.lost is not None
    client.put(EngineReady(llm.model, 1), step([(again[0].request_id, 101)]))
    assert [delta.token_ids for delta in await streams[0].next()] == [[101]]
    assert llm.lost is None and llm.dead is None
    client.put(EngineLost("no step", 2, hung=True))
    for stream in (streams[0], streams[2]):  # one had begun, one was sent twice
        with pytest.raises(EngineDeadError):
            await asyncio.wait_for(stream.next(), 10)
    assert len(client.requests) == 5 and llm.num_unfinished == 0
    assert llm.lost is not None and llm.lost.code == "engine_hung"


async def test_late_words_of_a_lost_engine_are_not_how_the_next_one_stands(
    llm: AsyncLLM, client: FakeClient
) -> None:
    full = SchedulerStats(num_running=9, num_waiting_tokens=10**9)
    client.put(step(stats=full), EngineLost("the engine process ended", 1), step(stats=full))
    client.put(EngineReady(llm.model, 1))
    await settle()
    assert llm.lost is None
    assert (llm.stats.num_running, llm.stats.num_waiting_tokens) == (0, 0)
    client.put(step(stats=SchedulerStats(num_running=1)))
    await settle()
    assert llm.stats.num_running == 1


async def test_utility_calls(llm: AsyncLLM, client: FakeClient) -> None:
    def answer(message: object) -> None:
        assert isinstance(message, UtilityCall)
        if message.method == "reset_prefix_cache":
            client.put(UtilityResult(message.call_id, True), UtilityResult(10**6, None))
        else:
            client.put(UtilityResult(message.call_id, error=f"no {message.method}"))

    client.on_send = answer
    assert await llm.reset_prefix_cache() is True
    with pytest.raises(EngineError, match="no dance"):
        await llm.call("dance", 1)


class FakeEngine:
    """The process that `launch` thinks it started."""

    def __init__(self, client: FakeClient, model: ModelInfo) -> None:
        self.client = client
        self.model = model
        self.dead = False
        self.stopped = 0

    def connect(self, index: int) -> FakeClient:
        return self.client

    def wait_ready(self, client: FakeClient) -> ModelInfo:
        if self.model.name == "broken":
            raise ConfigError("no such model")
        return self.model

    def alive(self) -> bool:
        return not self.dead

    def shutdown(self) -> None:
        self.stopped += 1


async def test_launch_owns_its_engine(
    client: FakeClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(write_sentencepiece(tmp_path / "m.gguf"))
    engine = FakeEngine(client, model_info(tokenizer=path, chat_template="{{ 1 }}"))
    monkeypatch.setattr(async_llm, "launch_engine", lambda config: engine)
    monkeypatch.setattr(async_llm, "_WATCH_S", 0.001)
    llm = await AsyncLLM.launch("m", max_num_seqs=3)
    assert llm.tokenizer is not None and llm.input_processor.template is not None
    stream = await llm.submit([5], SamplingParams(), request_id="r")
    engine.dead = True
    with pytest.raises(EngineDeadError, match="ended"):
        await asyncio.wait_for(stream.next(), 10)
    llm.shutdown()
    llm.shutdown()
    assert engine.stopped == 1 and client.closed
    engine.model = model_info(name="broken")
    with pytest.raises(ConfigError, match="no such model"):
        await AsyncLLM.launch("m")
    assert engine.stopped == 2


async def test_shutdown_ends_requests(client: FakeClient) -> None:
    llm = build(client)
    stream = await llm.submit([5], SamplingParams(), request_id="r")
    llm.shutdown()
    llm.shutdown()
    with pytest.raises(EngineDeadError):
        await stream.next()
