# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Request bodies: JSON, the fields that both generation routes share, and those refused by name.

A top-level null is the same as an absent field. Ranges are the API's own; the engine checks again.
"""

import json
import math
import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import msgspec
from fastapi import Request
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from starlette.requests import ClientDisconnect

from llmserve.api.errors import (
    ClientGone,
    HttpError,
    clip,
    from_validation,
    invalid_type,
    invalid_value,
    unsupported,
)
from llmserve.core.messages import ModelInfo
from llmserve.core.sampling_params import (
    MAX_BAD_WORDS,
    MAX_LOGPROB_IDS,
    MAX_N,
    MAX_STOP_STRINGS,
    RepetitionDetection,
)
from llmserve.errors import RequestError
from llmserve.frontend.beam_search import WITHOUT_EFFECT, BeamOptions
from llmserve.frontend.input_processor import Truncation

Body = TypeVar("Body", bound="RequestBody")

INT64_MAX = 2**63 - 1
MAX_LOGIT_BIAS = 100.0
MAX_TOP_LOGPROBS = 1 << 20  # the model's own limit, usually 20, is checked by the engine's front
MAX_IGNORED_NAMES = 20
MAX_TEMPLATE_CHARS = 1 << 18
_MAX_SALT_CHARS = 128
_MAX_DIGITS = 4300  # of a number, as in Python itself
_HALF_PAIR = re.compile(
    r"\\u[dD][89abAB]..(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB]..)\\u[dD][c-fC-F].."
)
_NAME_CHARS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.")

# Fields that would change the answer and are not built yet, with the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none",),
    "functions": ([],),
    "function_call": ("none",),
    "reasoning": ({},),
    "reasoning_effort": ("none",),
    "include_reasoning": (True,),
    "thinking": (),
    "modalities": (["text"], []),
    "audio": (),
    "web_search_options": (),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "prompt_embeds": ([],),
    "kv_transfer_params": ({},),
    "ec_transfer_params": ({},),
    "logits_processors": ([],),
    "custom_logit_processor": (),
    "watermarking": (False,),
    "lora_path": (),
    "session_params": (),
    "return_hidden_states": (False,),
}


class _BadToken(ValueError):
    """Text that Python takes for a number and JSON does not, or that no number can hold."""


def _bad_token(token: str) -> None:
    raise _BadToken(token)


def _check_int(digits: str) -> None:
    if len(digits) > _MAX_DIGITS:
        raise _BadToken(digits)


def _check_float(token: str) -> None:
    if math.isinf(float(token)):
        raise _BadToken(token)


async def read_json(request: Request) -> dict[str, Any]:
    """The body as a JSON object; HttpError or RequestError say what is wrong with it."""
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise HttpError(415, "Compressed request bodies are not supported.")
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise RequestError("Unsupported Content-Type: only application/json is allowed.")
    try:
        data = await request.body()
    except ClientDisconnect:
        raise ClientGone from None
    try:
        body = msgspec.json.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise RequestError(f"The request body is not valid JSON: {_json_fault(data)}.") from None
    if not isinstance(body, dict):
        raise RequestError("The request body must be a JSON object.")
    return body


def _json_fault(data: bytes) -> str:
    if not data.strip():
        return "it is empty"
    try:
        text = data.decode()
        json.loads(text, parse_constant=_bad_token, parse_int=_check_int, parse_float=_check_float)
    except json.JSONDecodeError as error:
        return f"{error.msg.removesuffix(' at')} {_place(text, error.pos)}"
    except UnicodeDecodeError as error:
        before = data[: error.start].decode()
        return f"not UTF-8 {_place(before, len(before))}"
    except RecursionError:
        return "it is nested too deeply"
    except _BadToken as error:
        token = str(error)
        found = re.search(rf"[:\[,]\s*({re.escape(token)})", text)
        what = "is too large a number" if token[-1].isdigit() else "is no JSON number"
        return f"{clip(token)} {what}, {_place(text, found.start(1) if found else 0)}"
    found = _HALF_PAIR.search(text)
    return f"half of a surrogate pair {_place(text, found.start() if found else 0)}"


def _place(text: str, at: int) -> str:
    return f"at line {text.count(chr(10), 0, at) + 1} column {at - text.rfind(chr(10), 0, at)}"


def _stop_list(value: object) -> object:
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise invalid_type("stop", "a string or an array of strings", value)
    return value


def _logit_bias(value: object) -> object:
    if not isinstance(value, dict):
        raise invalid_type("logit_bias", "an object", value)
    for key, bias in value.items():
        if not key.isascii() or not key.isdecimal() or len(key) > 9:
            raise invalid_value("logit_bias", f"its keys must be token ids, got '{clip(key)}'")
        if isinstance(bias, bool) or not isinstance(bias, int | float):
            raise invalid_type("logit_bias", "a number as each value", bias)
        if abs(bias) > MAX_LOGIT_BIAS:
            side = "above_max" if bias > 0 else "below_min"
            raise invalid_value(
                "logit_bias",
                f"each bias must be between -100 and 100, got {clip(str(bias))}",
                f"decimal_{side}_value",
            )
    return {int(key): float(bias) for key, bias in value.items()}


def _cache_salt(value: object) -> object:
    if isinstance(value, str) and set(value[:_MAX_SALT_CHARS]) & set("@/\\\0"):
        raise invalid_value("cache_salt", "it must not contain @, /, \\ or NUL")
    return value


def _request_id(value: object) -> object:
    if isinstance(value, str) and not valid_request_id(value):
        raise invalid_value(
            "request_id", f"it must be 1 to 128 of A-Z a-z 0-9 . _ -, got '{clip(value)}'"
        )
    return value


def valid_request_id(text: str) -> bool:
    """Whether a client's id may stand in headers, ids and logs."""
    return 1 <= len(text) <= 128 and set(text) <= _NAME_CHARS


class StreamOptions(BaseModel):
    """`continuous_usage_stats` puts the running usage into every chunk."""

    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Repetition(BaseModel):
    """SamplingParams' repetition_detection, which checks its ranges."""

    model_config = ConfigDict(strict=True, extra="forbid")

    max_pattern_size: int | None = None
    min_pattern_size: int | None = None
    min_count: int | None = None


XArg = str | int | float


def _extra_args(value: object) -> object:
    for name, arg in value.items() if isinstance(value, dict) else ():
        for one in arg if isinstance(arg, list) else [arg]:
            if isinstance(one, bool) or not isinstance(one, XArg):
                path = f"vllm_xargs.{name[:64]}"
                raise invalid_type(path, "a string, a number or an array of these", one)
    return value


TokenIds = list[Annotated[int, Field(ge=0, le=2**31 - 1)]]


class RequestBody(BaseModel):
    """What every body may carry."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    model: str | None = None

    @classmethod
    def parse(cls: type[Body], body: dict[str, Any]) -> Body:
        """From a JSON object; RequestError names the first field that is wrong."""
        given = {name: value for name, value in body.items() if value is not None}
        for name, harmless in UNSUPPORTED.items():
            if name in cls.model_fields or name not in given:
                continue
            if not any(_same(given[name], value) for value in harmless):
                raise unsupported(name)
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            raise from_validation(error.errors(include_url=False)) from None

    @classmethod
    def without_effect(cls, body: dict[str, Any]) -> set[str]:
        """Fields of ours that mean nothing beside the others of this body."""
        return set()

    @classmethod
    def ignored(cls, body: dict[str, Any], unread: Iterable[str] = ()) -> dict[str, str]:
        """The header that names the fields which were accepted and have no effect.

        `unread` are known ones that this model has no use for.
        """
        known = cls.model_fields.keys() - cls.without_effect(body) - set(unread)
        names = [
            name
            for name, value in body.items()
            if name not in known and value is not None and set(name) <= _NAME_CHARS and name
        ]
        if not names:
            return {}
        return {"x-llmserve-ignored": ", ".join(name[:64] for name in names[:MAX_IGNORED_NAMES])}


def _same(value: object, other: object) -> bool:
    return type(value) is type(other) and value == other


class GenerationBody(RequestBody):
    """Fields of /v1/chat/completions and /v1/completions alike. None is the model's default."""

    max_tokens: int | None = Field(None, le=INT64_MAX)
    n: int = Field(1, ge=1, le=MAX_N)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=INT64_MAX)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=1e-6, le=1e6)
    logit_bias: Annotated[dict[int, float], BeforeValidator(_logit_bias)] | None = None
    allowed_token_ids: TokenIds | None = Field(None, min_length=1)
    bad_words: list[Annotated[str, Field(min_length=1)]] | None = Field(
        None, max_length=MAX_BAD_WORDS
    )
    seed: int | None = Field(None, ge=-(2**63), le=INT64_MAX)
    stop: (
        Annotated[
            list[Annotated[str, Field(min_length=1)]],
            Field(max_length=MAX_STOP_STRINGS),
            BeforeValidator(_stop_list),
        ]
        | None
    ) = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = Field(0, ge=0, le=INT64_MAX)
    logprob_token_ids: TokenIds | None = Field(None, max_length=MAX_LOGPROB_IDS)
    prompt_logprobs: int | None = Field(None, ge=-1, le=MAX_TOP_LOGPROBS)
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    stream: bool = False
    stream_options: StreamOptions | None = None
    stream_interval: int = Field(1, ge=1, le=INT64_MAX)
    truncate_prompt_tokens: int | None = Field(None, ge=-1, le=INT64_MAX)
    truncation_side: Literal["left", "right"] = "left"
    use_beam_search: bool = False
    length_penalty: float = Field(1.0, ge=-10, le=10)
    early_stopping: bool = False
    echo: bool = False
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    repetition_detection: Repetition | None = None
    thinking_token_budget: int | None = Field(None, ge=-1, le=2**31 - 1)
    priority: int = Field(0, ge=-(2**31), le=2**31 - 1)
    cache_salt: Annotated[str, BeforeValidator(_cache_salt)] | None = Field(
        None, min_length=1, max_length=_MAX_SALT_CHARS
    )
    vllm_xargs: Annotated[dict[str, XArg | list[XArg]], BeforeValidator(_extra_args)] | None = None
    request_id: Annotated[str, BeforeValidator(_request_id)] | None = None
    # The shape of the answer, checked by structured.structured_outputs_of; older names last
    response_format: Any = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    guided_json_object: Any = None
    structural_tag: Any = None
    regex: Any = None
    ebnf: Any = None
    json_schema: Any = None
    grammar: Any = None

    def check(self) -> None:
        """Rules between fields; RequestError."""
        if self.stream_options is not None and not self.stream:
            raise invalid_value("stream_options", "it is only allowed with stream=true")
        if self.stream and self.prompt_logprobs is not None:
            raise invalid_value("prompt_logprobs", "it is not available with stream=true")
        if self.use_beam_search and self.stream:
            raise invalid_value("stream", "it is not available with use_beam_search=true")
        if self.logprob_token_ids:
            if self.use_beam_search:
                raise invalid_value(
                    "logprob_token_ids", "it is not available with use_beam_search=true"
                )
            if not self.wants_logprobs:
                raise invalid_value("logprob_token_ids", "it needs logprobs")
        if self.n > 1 and self.temperature == 0 and not self.use_beam_search:
            raise invalid_value(
                "n", f"it must be 1 with temperature=0, which makes equal answers, got {self.n}"
            )

    @classmethod
    def without_effect(cls, body: dict[str, Any]) -> set[str]:
        """Beam search draws nothing; its own fields mean nothing without it."""
        names = set(WITHOUT_EFFECT if body.get("use_beam_search") else _BEAM_FIELDS)
        return names | (
            {"truncation_side"} if body.get("truncate_prompt_tokens") is None else set()
        )

    def truncation(self, max_model_len: int, max_tokens: int | None) -> Truncation | None:
        """How to shorten prompts, where that is asked for; RequestError.

        -1 keeps what fits into the context beside `max_tokens` new tokens, at least one of each.
        """
        tokens = self.truncate_prompt_tokens
        if tokens is None:
            return None
        if tokens == 0:
            raise invalid_value(
                "truncate_prompt_tokens", "it must be -1 or at least 1, got 0",
                "integer_below_min_value",
            )  # fmt: skip
        if tokens > max_model_len:
            raise invalid_value(
                "truncate_prompt_tokens",
                f"it must be at most the maximum context length, {max_model_len} tokens, "
                f"got {tokens}",
                "integer_above_max_value",
            )
        if tokens == -1:
            tokens = max(1, max_model_len - max(1, max_tokens or 1))
        return Truncation(tokens, self.truncation_side == "left")

    def unread(self, model: ModelInfo) -> list[str]:
        """Fields that this server has no use for."""
        return [] if model.has_priorities or not self.priority else ["priority"]

    @property
    def beam(self) -> BeamOptions | None:
        """How to search, where beam search is asked for."""
        if not self.use_beam_search:
            return None
        return BeamOptions(self.length_penalty, self.early_stopping)

    @property
    def wants_logprobs(self) -> bool:
        """Whether generated tokens get log-probabilities."""
        raise NotImplementedError

    def sampling_fields(self) -> dict[str, Any]:
        """SamplingParams' fields as far as the client gave them, without the token limits."""
        names = self.model_fields_set & _SAMPLING_FIELDS
        fields = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.repetition_detection is not None:
            fields["repetition_detection"] = _detection(self.repetition_detection)
        return fields


def _detection(asked: Repetition) -> RepetitionDetection | None:
    if not asked.max_pattern_size:
        return None
    return RepetitionDetection(
        max_pattern_size=asked.max_pattern_size,
        min_pattern_size=asked.min_pattern_size or 1,
        min_count=2 if asked.min_count is None else asked.min_count,
    )


_BEAM_FIELDS = frozenset({"length_penalty", "early_stopping"})
_SAMPLING_FIELDS = frozenset(
    {
        "n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
        "repetition_penalty", "logit_bias", "allowed_token_ids", "bad_words", "seed", "stop",
        "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "min_tokens",
        "logprob_token_ids", "prompt_logprobs", "skip_special_tokens",
        "spaces_between_special_tokens",
    }
)  # fmt: skip


class TokenLimit(NamedTuple):
    """`max_tokens` and the field that it came from."""

    value: int | None
    param: str

    def check(self, least: int, max_model_len: int) -> None:
        """RequestError where it is under `least`, or over the context all by itself."""
        if self.value is None:
            return
        if self.value < least:
            raise invalid_value(
                self.param,
                f"it must be at least {least}, got {self.value}",
                "integer_below_min_value",
            )
        if self.value > max_model_len:
            raise invalid_value(
                self.param,
                f"it must be at most the maximum context length, {max_model_len} tokens, "
                f"got {self.value}",
                "integer_above_max_value",
            )
