# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What one request asks of the sampler."""

from collections.abc import Collection
from typing import Any

import msgspec

from llmserve.core.structured_outputs import GrammarSpec, StructuredOutputsParams
from llmserve.errors import RequestError

_INT64_MAX = 2**63 - 1
_FLOAT32_MAX = 3.4028234663852886e38  # logits are float32
MAX_N = 128
MAX_BAD_WORDS = 128
MAX_BAD_WORD_TOKENS = 1024
MAX_STOP_STRINGS = 16
MAX_LOGPROB_IDS = 128
MAX_PATTERN = 1024
_TOO_LONG = "array_above_max_length"
# Of the prompts, and of the tokens of an answer that is not streamed: 50 MB on their way, 2 GB and
# some 6 s of a thread as Python objects (4.6 M of them: 1,880 MB, 4.2 s). The default of 20 a token
# has room for 199,728 tokens.
MAX_LOGPROBS = 1 << 22


class RepetitionDetection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An output ends where its last tokens are one pattern of `min_pattern_size` to
    `max_pattern_size` tokens, `min_count` times in a row. A largest size of 0 looks for none."""

    max_pattern_size: int = 0
    min_pattern_size: int = 1
    min_count: int = 2

    def __post_init__(self) -> None:
        _within("repetition_detection.max_pattern_size", self.max_pattern_size, 0, MAX_PATTERN)
        if self.max_pattern_size:
            high = self.max_pattern_size
            _within("repetition_detection.min_pattern_size", self.min_pattern_size, 1, high)
            _within("repetition_detection.min_count", self.min_count, 2, MAX_PATTERN)


class ReasoningBudget(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How much an output may think: after `tokens` tokens of reasoning the end of it is forced.

    Reasoning runs from one of `opens`, at the start of the output, to one of `closes`; one that
    begins `inside` has its opener in the prompt. Where it `reopens`, each opener begins it again.
    `pieces` are the bytes of the tokens that can be part of those texts or are whitespace: any
    other token is no part of them. `endings[i]` are the token ids that are forced when the budget
    is spent for the i-th time, the last one for good.
    """

    tokens: int
    opens: list[bytes]
    closes: list[bytes]
    endings: list[list[int]]
    pieces: dict[int, bytes]
    inside: bool = False
    reopens: bool = False


class SamplingParams(msgspec.Struct, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Sampling parameters with vLLM's names and defaults.

    The draw is argmax(logit / temperature + Gumbel(seed, output index, token id)) over the kept
    set; temperature 0 is plain argmax. `top_k` 0 or -1 keeps all tokens. `seed` None means that
    the request gets one at admission. Token ids are checked against the logits width by
    `check_token_ids`, once in the frontend and once in the engine.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] = []
    bad_words_token_ids: list[list[int]] = []
    seed: int | None = None
    stop: list[str] = []
    stop_token_ids: list[int] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    logprob_token_ids: list[int] = []  # get log-probabilities beside those of `logprobs`
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    structured_outputs: StructuredOutputsParams | None = None
    grammar: GrammarSpec | None = None  # what the frontend makes of `structured_outputs`
    reasoning_budget: ReasoningBudget | None = None
    repetition_detection: RepetitionDetection | None = None
    extra_args: dict[str, Any] = {}

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            self.stop = [self.stop]
        if self.top_k == -1:
            self.top_k = 0
        self.check()

    def check(self) -> None:
        """Raises RequestError for the first field out of its range; NaN is out of every range."""
        _within("n", self.n, 1, MAX_N)
        _within("temperature", self.temperature, 0.0, 2.0)
        if not 0.0 < self.top_p <= 1.0:
            limit = "greater than 0 and at most 1"
            raise _range_error("top_p", self.top_p, limit, _side("decimal", self.top_p <= 0.0))
        _within("top_k", self.top_k, 0, _INT64_MAX)
        _within("min_p", self.min_p, 0.0, 1.0)
        _within("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _within("repetition_penalty", self.repetition_penalty, 1e-6, 1e6)  # logits stay finite
        if self.seed is not None:
            _within("seed", self.seed, -(2**63), _INT64_MAX)
        if self.max_tokens is not None:
            _within("max_tokens", self.max_tokens, 0, _INT64_MAX)
        _within("min_tokens", self.min_tokens, 0, _INT64_MAX)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            limit = f"at most max_tokens={self.max_tokens}"
            raise _range_error("min_tokens", self.min_tokens, limit, _side("integer", False))
        if self.logprobs is not None:
            _within("logprobs", self.logprobs, -1, _INT64_MAX)
        if len(self.logprob_token_ids) > MAX_LOGPROB_IDS:
            given, limit = len(self.logprob_token_ids), f"at most {MAX_LOGPROB_IDS} ids"
            raise _range_error("logprob_token_ids", given, limit, _TOO_LONG)
        if self.logprob_token_ids and self.logprobs is None:
            raise RequestError("logprob_token_ids: needs logprobs", param="logprob_token_ids")
        if self.prompt_logprobs is not None:
            _within("prompt_logprobs", self.prompt_logprobs, -1, _INT64_MAX)
        if len(self.stop) > MAX_STOP_STRINGS:
            limit = f"at most {MAX_STOP_STRINGS} strings"
            raise _range_error("stop", len(self.stop), limit, _TOO_LONG)
        if not all(self.stop):
            raise RequestError("stop: an empty string can never be a stop string", param="stop")
        if self.stop and not self.detokenize:
            raise RequestError("stop: stop strings need detokenize=True", param="stop")
        for token, bias in self.logit_bias.items():
            if not -_FLOAT32_MAX <= bias <= _FLOAT32_MAX:  # NaN fails, too
                raise _range_error(f"logit_bias[{token}]", bias, "a finite number", "invalid_value")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise RequestError("allowed_token_ids: must not be empty", param="allowed_token_ids")
        if len(self.bad_words) > MAX_BAD_WORDS:
            limit = f"at most {MAX_BAD_WORDS} words"
            raise _range_error("bad_words", len(self.bad_words), limit, _TOO_LONG)
        if not all(self.bad_words):
            raise RequestError("bad_words: an empty string is no word", param="bad_words")

    def check_token_ids(self, logits_width: int) -> None:
        """Raises RequestError where a token id is outside [0, `logits_width`)."""
        if self.logit_bias:
            _check_ids("logit_bias", self.logit_bias, logits_width)
        if self.allowed_token_ids:
            _check_ids("allowed_token_ids", self.allowed_token_ids, logits_width)
        if self.stop_token_ids:
            _check_ids("stop_token_ids", self.stop_token_ids, logits_width)
        for word in self.bad_words_token_ids:
            _check_ids("bad_words", word, logits_width)
        if self.logprob_token_ids:
            _check_ids("logprob_token_ids", self.logprob_token_ids, logits_width)
        if self.logprobs is not None:
            _check_count("logprobs", self.logprobs, logits_width)
        if self.prompt_logprobs is not None:
            _check_count("prompt_logprobs", self.prompt_logprobs, logits_width)
        if self.reasoning_budget is not None:
            for ending in self.reasoning_budget.endings:
                _check_ids("thinking_token_budget", ending, logits_width)
        if self.bad_words_token_ids:
            num_bad = sum(map(len, self.bad_words_token_ids))
            if num_bad > MAX_BAD_WORD_TOKENS:
                limit = f"at most {MAX_BAD_WORD_TOKENS} tokens in all"
                raise _range_error("bad_words", num_bad, limit, _TOO_LONG)

    def num_prompt_logprobs(self, prompt_len: int) -> int:
        """How many the whole prompt has."""
        return 0 if self.prompt_logprobs is None else (self.prompt_logprobs + 1) * prompt_len

    def check_prompt_logprobs(self, prompt_len: int, times: int = 1) -> None:
        """Raises RequestError where those of the whole prompt, given so often, are too many."""
        if (number := self.num_prompt_logprobs(prompt_len) * times) > MAX_LOGPROBS:
            each = f"{number // prompt_len // times} for each of the prompt's {prompt_len} tokens"
            choices = f" in {times} choices" if times > 1 else ""
            raise RequestError(
                f"prompt_logprobs: {each}{choices} are {number}; a request gets at most "
                f"{MAX_LOGPROBS}",
                param="prompt_logprobs",
                code="integer_above_max_value",
            )

    @property
    def greedy(self) -> bool:
        """Whether the draw needs no random numbers."""
        return self.temperature == 0.0

    @property
    def masked(self) -> bool:
        """Whether something outside the sampler may forbid tokens from step to step."""
        return self.grammar is not None or self.reasoning_budget is not None

    def clone(self, **changes: Any) -> "SamplingParams":
        """A copy with `changes`."""
        return msgspec.structs.replace(self, **changes)


def _range_error(field: str, value: object, limit: str, code: str) -> RequestError:
    message = f"{field} must be {limit}, got {value}"
    return RequestError(message, param=field.split("[")[0], code=code)


def _check_ids(field: str, ids: Collection[int], logits_width: int) -> None:
    if len(ids) > logits_width:
        raise _range_error(field, len(ids), f"at most {logits_width} token ids", _TOO_LONG)
    for token in ids:
        if not 0 <= token < logits_width:
            limit = f"a token id from 0 to {logits_width - 1}"
            raise _range_error(field, token, limit, _side("integer", token < 0))


def _check_count(field: str, value: int, logits_width: int) -> None:
    if value > logits_width:
        limit = f"at most the vocabulary size, {logits_width}"
        raise _range_error(field, value, limit, _side("integer", False))


def _side(kind: str, below: bool) -> str:
    return f"{kind}_{'below_min' if below else 'above_max'}_value"


def _within(field: str, value: float, low: float, high: float) -> None:
    if low <= value <= high:  # written so that NaN fails
        return
    kind = "integer" if isinstance(value, int) else "decimal"
    raise RequestError(
        f"{field} must be between {low} and {high}, got {value}",
        param=field,
        code=_side(kind, value < low),
    )
