# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What reaches the engine, and what is refused before it."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from llmserve.config.model import ModelConfig
from llmserve.core.sampling_params import SamplingParams
from llmserve.core.structured_outputs import StructuredOutputsParams
from llmserve.errors import ConfigError, ContextLengthError, RequestError
from llmserve.frontend.chat_template import ChatTemplate
from llmserve.frontend.input_processor import InputProcessor
from tests.helpers.frontend import byte_level, model_info, write_sentencepiece

TOKENIZER = byte_level()
TEMPLATE = ChatTemplate("{% for m in messages %}{{ m.content }}{{ style }}{% endfor %}", {})


def processor(
    *,
    tokenizer: Any = TOKENIZER,
    template: Any = TEMPLATE,
    max_logprobs: int = 20,
    structured_outputs_config: dict[str, Any] | None = None,
    **model: Any,
) -> InputProcessor:
    return InputProcessor(
        model_info(**model),
        tokenizer,
        template,
        max_logprobs=max_logprobs,
        default_template_kwargs={"style": "!"},
        structured_outputs_config=structured_outputs_config,
    )


def make(fields: dict[str, Any], prompt_len: int = 10, **kwargs: Any) -> tuple[Any, int | None]:
    return processor(**kwargs).make_params(fields, prompt_len=prompt_len, param="messages")


def refused(match: str, param: str, fields: dict[str, Any], prompt_len: int = 10, **kw: Any) -> Any:
    with pytest.raises(RequestError, match=match) as caught:
        make(fields, prompt_len, **kw)
    assert (caught.value.param, caught.value.status) == (param, 400)
    return caught.value


def test_defaults_come_from_the_model_and_yield_to_the_request() -> None:
    defaults = {"temperature": 0.6, "top_k": 50, "max_new_tokens": 7, "foo": 1, "min_p": None}
    params, clamped = make({"top_k": 3, "top_p": None}, generation_defaults=defaults)
    assert (params.temperature, params.top_k, params.top_p, params.max_tokens) == (0.6, 3, 1.0, 7)
    assert clamped is None
    params, clamped = make({"temperature": 0.0, "max_tokens": 9}, generation_defaults=defaults)
    assert (params.temperature, params.max_tokens, clamped) == (0.0, 9, None)
    params, clamped = make({}, 60, generation_defaults=defaults)
    assert (params.max_tokens, clamped) == (4, None)  # nobody asked for seven


def test_max_tokens_is_what_fits() -> None:
    assert make({})[0].max_tokens == 54
    assert make({"max_tokens": 54})[1] is None
    params, clamped = make({"max_tokens": 64})
    assert (params.max_tokens, clamped) == (54, 54)
    refused("at most .* 64, got 65", "max_tokens", {"max_tokens": 65})
    refused("min_tokens", "min_tokens", {"min_tokens": 9, "max_tokens": 8})


@pytest.mark.parametrize("length", [64, 65, 1000])
def test_prompt_over_the_context_names_both_numbers(length: int) -> None:
    error = refused(
        rf"maximum context length is 64 tokens, but the prompt has {length} ",
        "messages",
        {},
        length,
    )
    assert isinstance(error, ContextLengthError) and error.code == "context_length_exceeded"


def test_a_full_context_can_still_be_scored() -> None:
    assert make({"max_tokens": 0}, 64)[0].max_tokens == 0
    refused("no tokens", "messages", {}, 0)


def test_logprobs_limit() -> None:
    for name in ("logprobs", "prompt_logprobs"):
        assert getattr(make({name: 20})[0], name) == 20
        refused("at most 20", name, {name: 21})
        refused("at most 20", name, {name: -1})
        assert getattr(make({name: -1}, max_logprobs=-1)[0], name) == 400
        assert getattr(make({name: -1}, max_logprobs=400)[0], name) == 400
        refused("400", name, {name: 401}, max_logprobs=-1)
    limits = {"max_logprobs": -1, "max_model_len": 1 << 20, "logits_width": 1 << 20}
    assert make({"prompt_logprobs": 1023}, 1 << 12, **limits)
    says = "prompt_logprobs: 1025 for each of the prompt's 4096 tokens are 4198400; .* 4194304"
    refused(says, "prompt_logprobs", {"prompt_logprobs": 1024}, 1 << 12, **limits)


@pytest.mark.parametrize("bad", [-1, 400, 2**31, 2**63])
def test_token_ids_are_held_to_the_logits_width(bad: int) -> None:
    good = 399
    for name, value in (
        ("stop_token_ids", [bad]),
        ("allowed_token_ids", [1, bad]),
        ("logit_bias", {bad: 1.0}),
    ):
        refused("399", name, {name: value})
    assert make({"stop_token_ids": [good], "logit_bias": {str(good): 1}})[0].logit_bias == {
        399: 1.0
    }
    refused("token ids", "logit_bias", {"logit_bias": {"x": 1.0}})
    assert make({"stop_token_ids": [good] * 400})
    says = "at most 400 token ids, got 401"  # so that a message has a size
    refused(says, "stop_token_ids", {"stop_token_ids": [good] * 401})
    ids = processor().encode_prompt([5, bad], add_special_tokens=True, param="prompt[2]")
    with pytest.raises(RequestError, match=f"{bad} is not from 0 to 399") as caught:
        asyncio.run(ids)
    assert caught.value.param == "prompt[2]"


def test_bad_words_are_banned_with_and_without_a_space() -> None:
    params = make({"bad_words": ["cat", " dog"]})[0]
    texts = [TOKENIZER.decode(ids) for ids in params.bad_words_token_ids]
    assert texts == ["cat", " cat", " dog"]
    assert make({"bad_words": ["cat"]})[0].bad_words == ["cat"]


def test_without_a_tokenizer() -> None:
    params = make({}, tokenizer=None)[0]
    assert params.detokenize is False
    for field in ({"stop": ["x"]}, {"bad_words": ["x"]}):
        name = next(iter(field))
        with pytest.raises(RequestError, match=name):
            make(field, tokenizer=None)
    with pytest.raises(RequestError, match="--skip-tokenizer-init"):
        coroutine = processor(tokenizer=None).encode_prompt(
            "x", add_special_tokens=True, param="prompt"
        )
        asyncio.run(coroutine)
    given = SamplingParams(max_tokens=5)
    checked, _ = processor(tokenizer=None).check_params(given, prompt_len=3)
    assert (checked.detokenize, given.detokenize) == (False, True)


def test_params_that_need_no_change_are_not_copied() -> None:
    params = SamplingParams(max_tokens=5, logprobs=2)
    assert processor().check_params(params, prompt_len=3)[0] is params


def test_prompts_in_all_forms() -> None:
    ids = TOKENIZER.encode("the cat")
    front = processor()
    for prompt, text in (
        ("the cat", "the cat"), (ids, None), ({"prompt": "the cat"}, "the cat"),
        ({"prompt_token_ids": tuple(ids)}, None),
    ):  # fmt: skip
        assert asyncio.run(front.read_prompt(prompt)) == (text, ids)  # type: ignore[arg-type]
    assert front.read_prompts(["the cat", {"prompt_token_ids": [5]}, "the"]) == [
        ("the cat", ids), (None, [5]), ("the", TOKENIZER.encode("the"))
    ]  # fmt: skip
    for wrong in (5, {}, {"prompt": 3}, None):
        with pytest.raises(RequestError, match="a prompt is"):
            front.read_prompts([wrong])  # type: ignore[list-item]
    with pytest.raises(RequestError, match="prompt_token_ids"):
        front.read_prompts([[5, 400]])


def chat(front: InputProcessor, **kwargs: Any) -> tuple[str, list[int]]:
    return asyncio.run(
        front.render_chat(
            [{"role": "user", "content": "cat"}],
            add_generation_prompt=True,
            continue_final_message=False,
            add_special_tokens=False,
            template_kwargs=kwargs,
        )
    )


def test_render_chat() -> None:
    assert chat(processor()) == ("cat!", TOKENIZER.encode("cat!"))
    assert chat(processor(), style="?")[0] == "cat?"
    for name in ("messages", "add_generation_prompt", "tokenize", "chat_template"):
        with pytest.raises(RequestError, match=name) as caught:
            chat(processor(), **{name: True})
        assert caught.value.param == "chat_template_kwargs"
    with pytest.raises(RequestError, match="no chat template"):
        chat(processor(template=None))


def test_for_model_reads_tokenizer_and_template(tmp_path: Path) -> None:
    path = str(write_sentencepiece(tmp_path / "m.gguf"))
    info = model_info(tokenizer=path, chat_template="{{ bos_token }}{{ messages[0].content }}")

    def front(template: str | None = None, **config: Any) -> InputProcessor:
        return InputProcessor.for_model(
            info, ModelConfig(**config), chat_template=template, default_template_kwargs={}
        )

    assert chat(front())[0] == "<s>cat"
    assert chat(front("{{ 'x' }}"))[0] == "x"
    bare = front(skip_tokenizer_init=True)
    assert bare.tokenizer is None and bare.template is None
    with pytest.raises(RequestError, match="at most 3"):
        front(max_logprobs=3).make_params({"logprobs": 4}, prompt_len=1, param="prompt")


def test_structured_outputs_become_a_grammar() -> None:
    asked = StructuredOutputsParams(regex="a+")
    params = processor().check_params(SamplingParams(structured_outputs=asked), prompt_len=3)[0]
    assert params.grammar is not None and params.structured_outputs is None
    assert (params.grammar.kind, params.grammar.text) == ("regex", "a+")
    assert processor().check_params(params, prompt_len=3)[0].grammar == params.grammar
    wrong = SamplingParams(structured_outputs=StructuredOutputsParams(json={"type": "strin"}))
    with pytest.raises(RequestError, match="#/type"):
        processor().check_params(wrong, prompt_len=3)
    with pytest.raises(RequestError, match="needs a tokenizer"):
        processor(tokenizer=None).check_params(
            SamplingParams(structured_outputs=asked, detokenize=False), prompt_len=3
        )


def test_structured_outputs_config() -> None:
    asked = StructuredOutputsParams(json={"properties": {"a": {}}, "additionalProperties": {}})
    closed = StructuredOutputsParams(json={"properties": {"a": {}}})

    def made(params: StructuredOutputsParams, **config: Any) -> Any:
        return processor(structured_outputs_config=config).make_grammar(params)

    assert (made(closed).backend, made(closed).compact) == ("xgrammar", False)
    assert made(closed, backend="guidance").backend == "guidance"
    assert made(closed, disable_any_whitespace=True).compact
    with pytest.raises(RequestError, match="additionalProperties"):
        made(asked, backend="xgrammar")
    config = {"backend": "xgrammar", "disable_additional_properties": True}
    assert made(asked, **config).text == made(closed).text
    for bad in ({"backend": "outlines"}, {"disable_any_whitespace": "x"}, {"unknown": 1}):
        with pytest.raises(ConfigError, match="--structured-outputs-config"):
            ModelConfig(structured_outputs_config=bad)
