# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Offline use: one Python object with an engine process behind it."""

import contextlib
import itertools
import weakref
from collections.abc import Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import Any, cast

import msgspec
from tqdm import tqdm

from llmserve.config.engine import EngineConfig
from llmserve.core.messages import (
    EngineFailed,
    EngineOutputs,
    FromEngine,
    SchedulerStats,
    UtilityCall,
    UtilityResult,
)
from llmserve.core.outputs import RequestOutput
from llmserve.core.sampling_params import SamplingParams
from llmserve.engine.client import EngineClient
from llmserve.engine.launch import EngineProcess, launch_engine
from llmserve.errors import ConfigError, EngineDeadError, EngineError
from llmserve.frontend.beam_search import (
    BeamOptions,
    BeamSearch,
    BeamSearchOutput,
    BeamSearchParams,
)
from llmserve.frontend.chat_template import ChatTemplate, read_template
from llmserve.frontend.input_processor import InputProcessor, Prompt
from llmserve.frontend.output_processor import Gathered, OutputProcessor, Request
from llmserve.frontend.tokenizer import Tokenizer

# Keywords of vLLM's LLM that concern its server or its internals and change no result here.
_WITHOUT_EFFECT = frozenset(
    {"disable_log_stats", "disable_log_requests", "enable_log_requests", "swap_space",
     "disable_custom_all_reduce"}
)  # fmt: skip
_WAIT_S = 0.5  # between looks at whether the engine lives

Messages = list[dict[str, Any]]


class LLM:
    """A model in an engine process of its own; every engine flag is a keyword.

    Closed by `shutdown`, by leaving a `with` block, when collected, or at exit. Raises ConfigError
    for what cannot be served. Not for use from several threads at once.
    """

    def __init__(
        self,
        model: str = "",
        *,
        chat_template: str | None = None,
        default_chat_template_kwargs: dict[str, Any] | None = None,
        **flags: Any,
    ) -> None:
        flags = {name: v for name, v in flags.items() if name not in _WITHOUT_EFFECT}
        flags.setdefault("max_num_queued_reqs", 0)  # a batch may be larger than a server's queue
        flags.setdefault("max_inter_token_ms", 0)  # nobody waits for a single token
        config = EngineConfig.from_flags(model=model, **flags)
        engine = launch_engine(config)
        client = engine.connect(0)
        self._finalizer = weakref.finalize(self, _close, engine, client)
        try:
            self._open(config, engine, client, chat_template, default_chat_template_kwargs or {})
        except BaseException:  # boundary: what was started must not outlive the failure
            self._finalizer()
            raise

    def _open(
        self,
        config: EngineConfig,
        engine: EngineProcess,
        client: EngineClient,
        chat_template: str | None,
        template_kwargs: dict[str, Any],
    ) -> None:
        info = engine.wait_ready(client)
        self.model = info
        self._engine = engine
        self._client = client
        self._input = InputProcessor.for_model(
            info, config.model, chat_template=chat_template, default_template_kwargs=template_kwargs
        )
        self._tokenizer = self._input.tokenizer
        self._processor = OutputProcessor(client, self._tokenizer)
        self._request_ids = itertools.count()
        self._call_ids = itertools.count(1)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Continues each prompt; results in the order of the prompts.

        A prompt is a text, {"prompt": text} or {"prompt_token_ids": ids}. One SamplingParams is for
        all; None is the model's own defaults. RequestError before anything runs if one is wrong.
        """
        if isinstance(prompts, str | dict) or _is_ids(prompts):
            prompts = [cast(Prompt, prompts)]
        inputs = self._input.read_prompts(list(cast(Sequence[Prompt], prompts)))
        return self._run(inputs, sampling_params, use_tqdm, priority)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation or several. `tools` are given to the chat template."""
        conversations = cast(
            list[Messages], [messages] if messages and isinstance(messages[0], dict) else messages
        )
        template = None
        if chat_template is not None:
            source = read_template(chat_template)
            template = ChatTemplate(source, self.get_tokenizer().special_tokens)
        texts = [
            self._input.render(
                conversation,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                template_kwargs={"tools": tools} | (chat_template_kwargs or {}),
                template=template,
            )
            for conversation in conversations
        ]
        inputs = self._input.read_texts(texts, add_special_tokens=False)
        return self._run(inputs, sampling_params, use_tqdm, None)

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        *,
        use_tqdm: bool = False,
    ) -> list[BeamSearchOutput]:
        """The `beam_width` best continuations of each prompt that beam search finds."""
        self._check_open()
        if isinstance(prompts, str | dict) or _is_ids(prompts):
            prompts = [cast(Prompt, prompts)]
        options = BeamOptions(params.length_penalty, params.early_stopping)
        searches: list[tuple[list[int], BeamSearch]] = []
        for _, ids in self._input.read_prompts(list(cast(Sequence[Prompt], prompts))):
            checked = self._input.check_params(params.sampling_params(), prompt_len=len(ids))[0]
            eos = self.model.eos_token_ids
            searches.append((ids, BeamSearch(checked, options, eos, self.model.logits_width)))
        with _progress(len(searches), use_tqdm) as bar:
            while open_ones := [pair for pair in searches if not pair[1].done]:
                asked = [
                    [
                        Request(str(next(self._request_ids)), ids + beam.tokens, search.step_params)
                        for beam in search.live
                    ]
                    for ids, search in open_ones
                ]
                self._complete([request for requests in asked for request in requests])
                for (_, search), requests in zip(open_ones, asked, strict=True):
                    search.advance([(one.take()[0].logprobs or [])[0] for one in requests])
                    bar.update(search.done)
        return [search.output(self._tokenizer, ids) for ids, search in searches]

    def get_tokenizer(self) -> Tokenizer:
        """The tokenizer; ConfigError with skip_tokenizer_init."""
        if self._tokenizer is None:
            raise ConfigError("there is no tokenizer: skip_tokenizer_init is set")
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """SamplingParams with the model's generation defaults."""
        return SamplingParams(**self._input.generation_defaults)

    def get_metrics(self) -> SchedulerStats:
        """The engine's gauges and counters, as they stand."""
        return msgspec.convert(self._call("stats"), SchedulerStats)

    def reset_prefix_cache(self) -> bool:
        """Whether the cache could be emptied."""
        return bool(self._call("reset_prefix_cache"))

    def shutdown(self) -> None:
        """Ends the engine process; idempotent."""
        self._finalizer()

    close = shutdown

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.shutdown()

    def _run(
        self,
        inputs: list[tuple[str | None, list[int]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
        priority: Sequence[int] | None,
    ) -> list[RequestOutput]:
        self._check_open()
        params = sampling_params or self.get_default_sampling_params()
        each = [params] * len(inputs) if isinstance(params, SamplingParams) else list(params)
        for name, given in (("sampling_params", each), ("priority", priority)):
            if given is not None and len(given) != len(inputs):
                raise ConfigError(f"{name}: {len(given)} for {len(inputs)} prompts")
        requests = []
        for (text, ids), one in zip(inputs, each, strict=True):
            checked = self._input.check_params(one, prompt_len=len(ids))[0]
            requests.append(Request(str(next(self._request_ids)), ids, checked, text))
        outputs = [Gathered(request, self._tokenizer) for request in requests]
        fresh: list[Gathered] = []  # whose log-probabilities can be made dicts of meanwhile
        for output in outputs:
            if output.request.params.logprobs is not None:
                output.request.on_news = partial(fresh.append, output)
        total = sum(request.n for request in requests)
        with _progress(total, use_tqdm) as bar:
            self._complete(requests, priority, bar, fresh)
        for output in outputs:
            output.add(output.request.take())
        return [output.output() for output in outputs]

    def _complete(
        self,
        requests: list[Request],
        priority: Sequence[int] | None = None,
        bar: "tqdm[Any] | None" = None,
        fresh: list[Gathered] | None = None,
    ) -> None:
        with self._running(requests, priority):
            while left := self._processor.num_unfinished:
                self._step()
                while fresh:
                    output = fresh.pop()
                    if output.request.error is None:
                        output.add(output.request.take())
                if (done := left - self._processor.num_unfinished) and bar is not None:
                    bar.update(done)

    @contextlib.contextmanager
    def _running(self, requests: list[Request], priority: Sequence[int] | None) -> Iterator[None]:
        try:
            for i, request in enumerate(requests):
                self._processor.submit(request, priority=priority[i] if priority else 0)
            yield
        finally:
            for request in requests:  # nothing to do unless an error or Ctrl-C got here first
                self._processor.abort(request)

    def _check_open(self) -> None:
        if not self._finalizer.alive:
            raise EngineDeadError("this LLM was shut down")

    def _step(self) -> list[FromEngine]:
        """Waits for the engine and takes in all it says; the messages that are no step."""
        if not self._client.wait(_WAIT_S) and not self._engine.alive():
            self._processor.fail_all(EngineDeadError("the engine process ended"))
            raise EngineDeadError("the engine process ended")
        messages = self._client.receive()
        self._processor.process(m for m in messages if isinstance(m, EngineOutputs))
        for message in messages:
            if isinstance(message, EngineFailed):
                self._processor.fail_all(EngineDeadError(message.message))
                raise EngineDeadError(message.message)
        return [m for m in messages if not isinstance(m, EngineOutputs)]

    def _call(self, method: str, *args: Any) -> Any:
        self._check_open()
        call_id = next(self._call_ids)
        self._client.send(UtilityCall(self._client.index, call_id, method, list(args)))
        while True:
            for message in self._step():
                if isinstance(message, UtilityResult) and message.call_id == call_id:
                    if message.error is not None:
                        raise EngineError(message.error)
                    return message.value


def _is_ids(prompts: Any) -> bool:
    return isinstance(prompts, list) and bool(prompts) and isinstance(prompts[0], int)


def _progress(total: int, use_tqdm: bool) -> "tqdm[Any]":
    return tqdm(total=total, desc="Processed prompts", disable=not use_tqdm)


def _close(engine: EngineProcess, client: EngineClient) -> None:
    client.close()
    engine.shutdown()
