# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The offline LLM on a scripted engine."""

import gc
from pathlib import Path
from typing import Any

import pytest

from llmserve.config.engine import EngineConfig
from llmserve.core.messages import (
    EngineFailed,
    EngineRequest,
    FromEngine,
    ModelInfo,
    RequestExtra,
    ToEngine,
    UtilityCall,
    UtilityResult,
)
from llmserve.core.sampling_params import SamplingParams
from llmserve.errors import ConfigError, EngineDeadError, NumericalError, RequestError
from llmserve.frontend import llm as llm_module
from llmserve.frontend.llm import LLM
from llmserve.frontend.tokenizer import load_tokenizer
from tests.helpers.frontend import FakeClient, model_info, step, write_sentencepiece

TEMPLATE = "{% for m in messages %}[{{ m.content }}]{% endfor %}{{ tools | length if tools }}"


class EchoClient(FakeClient):
    """Answers each request with its prompt, last prompt first, one token a step."""

    def __init__(self) -> None:
        super().__init__()
        self.script: list[FromEngine] | None = None
        self._todo: list[tuple[int, list[int]]] = []

    def send(self, message: ToEngine) -> None:
        super().send(message)
        if isinstance(message, EngineRequest):
            prompt = message.prompt_token_ids.tolist()
            self._todo.insert(0, (message.request_id, prompt[: message.params.max_tokens]))
        elif isinstance(message, UtilityCall):
            value: Any = [7] if message.method == "stats" else True
            self.put(UtilityResult(message.call_id, value))

    def wait(self, timeout: float) -> bool:
        if self.script is not None:
            if self.script:
                self.put(self.script.pop(0))
            return super().wait(timeout)
        if self._todo:
            wire, ids = self._todo[0]
            if ids:
                self.put(step([(wire, ids.pop(0))]))
            else:
                self._todo.pop(0)
                self.put(step([], {wire: RequestExtra(finish_reason="length")}))
        return super().wait(timeout)


class FakeEngine:
    """The process that there is none of."""

    def __init__(self, config: EngineConfig, model: ModelInfo) -> None:
        self.config = config
        self.model = model
        self.client = EchoClient()
        self.stopped = 0
        self.dead = False

    def connect(self, index: int) -> EchoClient:
        assert index == 0
        return self.client

    def wait_ready(self, client: EchoClient) -> ModelInfo:
        if self.config.model.model == "broken":
            raise ConfigError("no such model")
        return self.model

    def alive(self) -> bool:
        return not self.dead

    def shutdown(self) -> None:
        self.stopped += 1


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[FakeEngine]:
    """Every engine that was launched."""
    path = str(write_sentencepiece(tmp_path / "m.gguf", add_bos_token=False))
    info = model_info(
        tokenizer=path, chat_template=TEMPLATE, generation_defaults={"temperature": 0.5}
    )
    launched: list[FakeEngine] = []

    def launch(config: EngineConfig) -> FakeEngine:
        launched.append(FakeEngine(config, info))
        return launched[-1]

    monkeypatch.setattr(llm_module, "launch_engine", launch)
    return launched


@pytest.fixture
def llm(engines: list[FakeEngine]) -> LLM:
    return LLM("m")


def test_results_are_in_the_order_of_the_prompts(llm: LLM, engines: list[FakeEngine]) -> None:
    prompts = ["the cat", {"prompt": "cat"}, {"prompt_token_ids": [260, 261]}, [270]]
    outputs = llm.generate(prompts, SamplingParams(max_tokens=20), use_tqdm=False)  # type: ignore[arg-type]
    assert [o.prompt for o in outputs] == ["the cat", "cat", None, None]
    tokenizer = load_tokenizer(engines[0].model.tokenizer)
    assert [o.outputs[0].token_ids for o in outputs] == [
        tokenizer.encode("the cat"), tokenizer.encode("cat"), [260, 261], [270]
    ]  # fmt: skip
    assert outputs[0].outputs[0].text == " the cat"
    assert all(o.finished and o.outputs[0].finish_reason == "length" for o in outputs)
    assert len({o.request_id for o in outputs}) == 4
    assert engines[0].client.aborted == []


@pytest.mark.parametrize("prompt", ["cat", {"prompt": "cat"}, [270, 271]])
def test_one_prompt(llm: LLM, prompt: Any) -> None:
    assert len(llm.generate(prompt, use_tqdm=False)) == 1
    assert llm.generate([], use_tqdm=False) == []


def test_parameters(llm: LLM, engines: list[FakeEngine]) -> None:
    client = engines[0].client
    llm.generate(["a", "b"], use_tqdm=False)
    assert [m.params.temperature for m in client.requests] == [0.5, 0.5]
    assert llm.get_default_sampling_params() == SamplingParams(temperature=0.5)
    both = [SamplingParams(max_tokens=1), SamplingParams(max_tokens=2, n=2)]
    outputs = llm.generate(["cat the", "cat the"], both, use_tqdm=False, priority=[3, 4])
    assert [[len(c.token_ids) for c in o.outputs] for o in outputs] == [[1], [2, 2]]
    assert [m.priority for m in client.requests[2:]] == [3, 4, 4]
    with pytest.raises(ConfigError, match="sampling_params: 2 for 1"):
        llm.generate("cat", both, use_tqdm=False)
    sent = len(client.sent)
    with pytest.raises(RequestError, match="400"):
        llm.generate([[5], [400]], use_tqdm=False)
    assert len(client.sent) == sent  # nothing ran


def test_chat(llm: LLM, engines: list[FakeEngine]) -> None:
    one = [{"role": "user", "content": "cat"}]
    outputs = llm.chat([one, one + one], use_tqdm=False)
    assert [o.prompt for o in outputs] == ["[cat]", "[cat][cat]"]
    (output,) = llm.chat(one, use_tqdm=False, tools=[{"name": "f"}])
    assert output.prompt == "[cat]1"
    (output,) = llm.chat(
        one, use_tqdm=False, chat_template="{{ x }}", chat_template_kwargs={"x": 5}
    )
    assert output.prompt == "5"
    assert LLM("m", chat_template="{{ 'hi' }}").chat(one, use_tqdm=False)[0].prompt == "hi"


def test_without_tokenizer(engines: list[FakeEngine]) -> None:
    llm = LLM(model="m", skip_tokenizer_init=True, disable_log_stats=True)
    params = SamplingParams(detokenize=False, temperature=0.0, ignore_eos=True, max_tokens=3)
    (output,) = llm.generate([{"prompt_token_ids": [5, 6, 7]}], [params], use_tqdm=False)
    assert (output.outputs[0].token_ids, output.outputs[0].text) == ([5, 6, 7], "")
    with pytest.raises(RequestError, match="tokenizer"):
        llm.generate("text", use_tqdm=False)
    with pytest.raises(ConfigError, match="skip_tokenizer_init"):
        llm.get_tokenizer()


def test_flags(engines: list[FakeEngine]) -> None:
    LLM("m", max_num_seqs=7, disable_log_stats=False)
    config = engines[0].config
    assert (config.model.model, config.scheduler.max_num_seqs) == ("m", 7)
    assert config.scheduler.max_num_queued_reqs == 0
    with pytest.raises(ConfigError, match="max-num-seqs"):
        LLM("m", max_num_seq=7)
    assert len(engines) == 1


def test_failures(llm: LLM, engines: list[FakeEngine]) -> None:
    client = engines[0].client
    error = RequestExtra(finish_reason="error", error="numerical_error", message="NaN")
    done = RequestExtra(finish_reason="length")
    client.script = [step([], {1: error}), step([(2, 270)], {2: done})]
    with pytest.raises(NumericalError, match="NaN"):
        llm.generate([[5], [6]], use_tqdm=False)
    client.script = [EngineFailed("it fell over", False)]
    with pytest.raises(EngineDeadError, match="fell over"):
        llm.generate([[5]], use_tqdm=False)
    client.script = []
    engines[0].dead = True
    with pytest.raises(EngineDeadError, match="ended"):
        llm.generate([[5]], use_tqdm=False)


def test_interrupt_aborts_what_runs(
    llm: LLM, engines: list[FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = engines[0].client

    def interrupt(timeout: float) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(client, "wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[5], [6]], use_tqdm=False)
    assert client.aborted == [m.request_id for m in client.requests]
    monkeypatch.undo()


def test_utilities(llm: LLM) -> None:
    assert llm.reset_prefix_cache() is True
    assert llm.get_metrics().num_running == 7
    assert llm.get_tokenizer().eos_token == "</s>"


def test_ends_with_the_engine(engines: list[FakeEngine]) -> None:
    with LLM("m") as llm:
        assert engines[0].stopped == 0
    llm.shutdown()
    assert engines[0].stopped == 1 and engines[0].client.closed
    with pytest.raises(EngineDeadError, match="shut down"):
        llm.reset_prefix_cache()
    with pytest.raises(EngineDeadError, match="shut down"):
        llm.generate([[5]], use_tqdm=False)
    with pytest.raises(ConfigError, match="no such model"):
        LLM("broken")
    assert engines[1].stopped == 1
    llm = LLM("m")
    del llm
    gc.collect()
    assert engines[2].stopped == 1
