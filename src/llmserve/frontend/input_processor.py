# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""From what a caller wrote to what the engine takes: token ids and checked sampling parameters."""

from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple, TypedDict, cast

import msgspec

from llmserve.config.model import ModelConfig
from llmserve.core.messages import ModelInfo
from llmserve.core.sampling_params import SamplingParams
from llmserve.core.structured_outputs import GrammarSpec, StructuredOutputsParams
from llmserve.errors import ConfigError, ContextLengthError, RequestError
from llmserve.frontend.chat_template import RESERVED, ChatTemplate, read_template
from llmserve.frontend.infill import find_infill
from llmserve.frontend.tokenizer import Tokenizer, load_tokenizer
from llmserve.structured_output.preparer import Preparer


class TextPrompt(TypedDict):
    """A prompt to tokenize."""

    prompt: str


class TokensPrompt(TypedDict):
    """A prompt that is tokenized already."""

    prompt_token_ids: list[int]


class Truncation(NamedTuple):
    """Keeps `tokens` of a longer prompt: its last ones, or its first."""

    tokens: int
    keep_last: bool = True

    def cut(self, ids: list[int]) -> list[int]:
        """`ids`, or a part of them."""
        return ids[-self.tokens :] if self.keep_last else ids[: self.tokens]


Prompt = str | list[int] | TextPrompt | TokensPrompt

# generation_config.json's names -> SamplingParams' names
_GENERATION_DEFAULTS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


class InputProcessor:
    """Everything is checked here before the engine sees it; errors are RequestErrors.

    `tokenizer` is None where the server deals in token ids only, `template` where the model has
    none. `max_logprobs` -1 is no limit. `takes_extra_args` says that somebody reads them.
    """

    def __init__(
        self,
        model: ModelInfo,
        tokenizer: Tokenizer | None,
        template: ChatTemplate | None,
        *,
        max_logprobs: int,
        default_template_kwargs: dict[str, Any],
        structured_outputs_config: dict[str, Any] | None = None,
        takes_extra_args: bool = False,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.template = template
        self._max_logprobs = max_logprobs
        self._default_template_kwargs = default_template_kwargs
        self._structured_outputs_config = structured_outputs_config or {}
        self.takes_extra_args = takes_extra_args
        self._preparer = Preparer()
        self.generation_defaults = {
            ours: model.generation_defaults[theirs]
            for theirs, ours in _GENERATION_DEFAULTS.items()
            if model.generation_defaults.get(theirs) is not None
        }

    @classmethod
    def for_model(
        cls,
        model: ModelInfo,
        config: ModelConfig,
        *,
        chat_template: str | None,
        default_template_kwargs: dict[str, Any],
    ) -> "InputProcessor":
        """Reads tokenizer and template. `chat_template`, a file or the text itself, replaces the
        model's. ConfigError if something cannot be read."""
        tokenizer = None if config.skip_tokenizer_init else load_tokenizer(model.tokenizer)
        source = model.chat_template if chat_template is None else read_template(chat_template)
        template = None
        if source is not None and tokenizer is not None:
            template = ChatTemplate(source, tokenizer.special_tokens)
        return cls(
            model,
            tokenizer,
            template,
            max_logprobs=config.max_logprobs,
            default_template_kwargs=default_template_kwargs,
            structured_outputs_config=config.structured_outputs_config,
            takes_extra_args=bool(config.logits_processors),
        )

    async def encode_prompt(
        self,
        prompt: str | list[int],
        *,
        add_special_tokens: bool,
        param: str,
        truncation: Truncation | None = None,
    ) -> list[int]:
        """Token ids of a text, or the ids themselves once checked."""
        if isinstance(prompt, str):
            limit = self.model.max_model_len if truncation is None else len(prompt)
            ids = await self._tokenizer(param).encode_async(
                prompt, add_special_tokens, max_tokens=limit, param=param
            )
        else:
            self.check_token_ids(prompt, param)
            ids = prompt
        return ids if truncation is None else truncation.cut(ids)

    async def infill_prompt(
        self, prompt: str | list[int], suffix: str, *, add_special_tokens: bool, param: str
    ) -> list[int]:
        """Token ids that ask for what stands between `prompt` and `suffix`; RequestError where the
        model knows no such thing."""
        tokenizer = self._tokenizer("suffix")
        infill = find_infill(tokenizer)
        if infill is None:
            raise RequestError(
                "Unsupported parameter: 'suffix' needs a model with tokens for filling in the "
                "middle, which this one has not.",
                param="suffix",
                code="unsupported_parameter",
            )
        before = await self.encode_prompt(prompt, add_special_tokens=False, param=param)
        after = await self.encode_prompt(suffix, add_special_tokens=False, param="suffix")
        start = tokenizer.encode("", add_special_tokens=add_special_tokens)
        return [*start, *infill.join(tokenizer, before, after)]

    async def read_prompt(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """A prompt in any of its forms: its text, where it has one, and its token ids."""
        text, ids = split_prompt(prompt)
        ids = await self.encode_prompt(
            ids if text is None else text, add_special_tokens=True, param="prompt"
        )
        return text, ids

    def read_prompts(self, prompts: list[Prompt]) -> list[tuple[str | None, list[int]]]:
        """`read_prompt` for many at once, on all cores."""
        split = [split_prompt(prompt) for prompt in prompts]
        texts = iter(self.read_texts([text for text, _ in split if text is not None]))
        for text, ids in split:
            if text is None:
                self.check_token_ids(ids, "prompt_token_ids")
        return [(None, ids) if text is None else next(texts) for text, ids in split]

    def read_texts(
        self, texts: list[str], *, add_special_tokens: bool = True
    ) -> list[tuple[str | None, list[int]]]:
        """Each text with its token ids."""
        if not texts:
            return []
        encoded = self._tokenizer("prompt").encode_batch(texts, add_special_tokens)
        return list(zip(texts, encoded, strict=True))

    def foreign_template(self, source: str) -> ChatTemplate:
        """A caller's own template, compiled; RequestError if it is none."""
        special = self._tokenizer("chat_template").special_tokens
        try:
            return _compiled(source, tuple(special.items()))
        except ConfigError as error:
            raise RequestError(f"chat_template: {error}", param="chat_template") from None

    async def render_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        add_special_tokens: bool,
        template_kwargs: dict[str, Any],
        truncation: Truncation | None = None,
        template: ChatTemplate | None = None,
    ) -> tuple[str, list[int]]:
        """The prompt that the chat template, or `template`, makes, as text and ids."""
        text = self.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_kwargs=template_kwargs,
            template=template,
        )
        ids = await self.encode_prompt(
            text,
            add_special_tokens=add_special_tokens,
            param="messages",
            truncation=truncation,
        )
        return text, ids

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        template_kwargs: dict[str, Any],
        template: ChatTemplate | None = None,
    ) -> str:
        """The prompt's text; `template` stands in for the model's."""
        template = template or self.template
        if template is None:
            raise RequestError(
                "The model has no chat template; give the server one (--chat-template) or send a "
                "plain prompt to /v1/completions.",
                param="messages",
            )
        kwargs = self._default_template_kwargs | template_kwargs
        if taken := RESERVED & kwargs.keys():
            raise RequestError(
                f"chat_template_kwargs: {min(taken)!r} cannot be set here",
                param="chat_template_kwargs",
            )
        return template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **kwargs,
        )

    def make_params(
        self, fields: dict[str, Any], *, prompt_len: int, param: str
    ) -> tuple[SamplingParams, int | None]:
        """Sampling parameters from request fields, None meaning "not given".

        What is not given comes from the model's generation defaults; `max_tokens` is then the rest
        of the context. The number is `max_tokens` where it had to be lowered to fit, else None.
        `param` names the prompt's field.
        """
        given = {name: value for name, value in fields.items() if value is not None}
        if (bias := given.get("logit_bias")) is not None:
            given["logit_bias"] = _int_keys(bias)
        values = {"max_tokens": None} | self.generation_defaults | given
        if self.tokenizer is None:
            values.setdefault("detokenize", False)
        if "max_tokens" not in given and values["max_tokens"] is not None:
            values["max_tokens"] = min(values["max_tokens"], self._room(prompt_len))
        return self.check_params(SamplingParams(**values), prompt_len=prompt_len, param=param)

    def read_extra_args(self, args: dict[str, Any] | None) -> dict[str, Any]:
        """What own logits processors are given; RequestError where there are none."""
        if args and not self.takes_extra_args:
            raise RequestError(
                "Unsupported parameter: 'vllm_xargs' needs a server with --logits-processors.",
                param="vllm_xargs",
                code="unsupported_parameter",
            )
        return args or {}

    def check_params(
        self, params: SamplingParams, *, prompt_len: int, param: str = "prompt"
    ) -> tuple[SamplingParams, int | None]:
        """`params` as the engine takes them (a copy if changed), and the lowered `max_tokens`."""
        limit = self.model.max_model_len
        max_tokens = params.max_tokens
        if max_tokens is not None and max_tokens > limit:
            raise RequestError(
                f"max_tokens must be at most the model's maximum context length, {limit}, "
                f"got {max_tokens}",
                param="max_tokens",
                code="integer_above_max_value",
            )
        self._check_prompt_len(prompt_len, 0 if max_tokens == 0 else 1, param)
        room = self._room(prompt_len)
        changes: dict[str, Any] = {}
        clamped = None
        if max_tokens is None or max_tokens > room:
            changes["max_tokens"] = room
            clamped = None if max_tokens is None else room
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(params, name)
            if value is not None:
                changes[name] = self._logprobs(name, value)
        if params.bad_words:
            changes["bad_words_token_ids"] = self._bad_words(params.bad_words)
        if params.stop:
            self._tokenizer("stop")
        if params.reasoning_budget is not None and params.allowed_token_ids is not None:
            endings = chain.from_iterable(params.reasoning_budget.endings)
            changes["allowed_token_ids"] = [*params.allowed_token_ids, *endings]
        if params.structured_outputs is not None:
            changes["grammar"] = self.make_grammar(params.structured_outputs)
            changes["structured_outputs"] = None
        if self.tokenizer is None and params.detokenize:
            changes["detokenize"] = False
        if any(getattr(params, name) != value for name, value in changes.items()):
            params = params.clone(**changes)
        params.check_token_ids(self.model.logits_width)
        params.check_prompt_logprobs(prompt_len)
        return params, clamped

    def make_grammar(self, params: StructuredOutputsParams) -> GrammarSpec:
        """What the output is bound to; RequestError for what nobody can enforce."""
        return self._preparer.prepare_here(*self._with_defaults(params))

    async def read_grammar(self, params: StructuredOutputsParams) -> GrammarSpec:
        """`make_grammar` beside the event loop."""
        return await self._preparer.prepare(*self._with_defaults(params))

    def _with_defaults(
        self, params: StructuredOutputsParams
    ) -> tuple[StructuredOutputsParams, str]:
        self._tokenizer(params.param)
        config = dict(self._structured_outputs_config)
        backend = config.pop("backend", "auto")
        given = {name: True for name, value in config.items() if value}
        return msgspec.structs.replace(params, **given), backend

    def close(self) -> None:
        """Ends what prepares grammars; idempotent."""
        self._preparer.close()

    def check_token_ids(self, ids: list[int], param: str) -> None:
        """RequestError for an id that the model has no row for."""
        width = self.model.logits_width
        if ids and (min(ids) < 0 or max(ids) >= width):
            wrong = next(i for i in ids if not 0 <= i < width)
            raise RequestError(
                f"{param}: token id {wrong} is not from 0 to {width - 1}",
                param=param,
                code=f"integer_{'below_min' if wrong < 0 else 'above_max'}_value",
            )

    def _check_prompt_len(self, prompt_len: int, least_new: int, param: str) -> None:
        limit = self.model.max_model_len
        if prompt_len == 0:
            raise RequestError(
                f"{param}: the prompt has no tokens", param=param, code="invalid_value"
            )
        if prompt_len + least_new > limit:
            rest = ", which leaves no room for a new one" if prompt_len == limit else ""
            raise ContextLengthError(
                f"This model's maximum context length is {limit} tokens, but the prompt has "
                f"{prompt_len} tokens{rest}.",
                param=param,
            )

    def _room(self, prompt_len: int) -> int:
        return max(0, self.model.max_model_len - prompt_len)

    def _logprobs(self, name: str, value: int) -> int:
        wanted = self.model.logits_width if value == -1 else value
        if wanted > self._max_logprobs != -1:
            shown = "-1 (the whole vocabulary)" if value == -1 else str(value)
            raise RequestError(
                f"{name} must be at most {self._max_logprobs} (--max-logprobs), got {shown}",
                param=name,
                code="integer_above_max_value",
            )
        return wanted

    def _bad_words(self, words: list[str]) -> list[list[int]]:
        """A word has other tokens at the start of a text than after a space: both are banned."""
        tokenizer = self._tokenizer("bad_words")
        variants = [
            tokenizer.encode(text, add_special_tokens=False)
            for word in words
            for text in (word, " " + word.lstrip())
        ]
        return [ids for i, ids in enumerate(variants) if ids and ids not in variants[:i]]

    def _tokenizer(self, param: str) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError(
                f"{param}: text needs a tokenizer, and this server runs without one "
                "(--skip-tokenizer-init); send token ids",
                param=param,
            )
        return self.tokenizer


@lru_cache(maxsize=16)
def _compiled(source: str, special: tuple[tuple[str, str], ...]) -> ChatTemplate:
    return ChatTemplate(source, dict(special))


def split_prompt(prompt: Prompt) -> tuple[str | None, list[int]]:
    """The text or the ids (then text is None) of a prompt in any of its forms."""
    if isinstance(prompt, str):
        return prompt, []
    if isinstance(prompt, list):
        return None, prompt
    if isinstance(prompt, dict):
        fields = cast(dict[str, Any], prompt)
        if "prompt_token_ids" in fields:
            return None, list(fields["prompt_token_ids"])
        if isinstance(fields.get("prompt"), str):
            return fields["prompt"], []
    raise RequestError(
        'a prompt is a text, token ids, {"prompt": text} or {"prompt_token_ids": ids}',
        param="prompt",
    )


def _int_keys(bias: dict[Any, float]) -> dict[int, float]:
    try:
        return {int(token): float(value) for token, value in bias.items()}
    except (TypeError, ValueError):
        raise RequestError("logit_bias: keys must be token ids", param="logit_bias") from None
