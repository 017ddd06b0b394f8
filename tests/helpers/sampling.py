# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""A sampler in float64, one row and one token at a time: what the real one is compared with."""

import math
from typing import Any

import numpy as np
import torch

from llmserve.core.sampling_params import SamplingParams
from llmserve.core.scheduler_output import NewRequest
from llmserve.sampling.sampler import Sampler

EOS = [2, 5]

torch.set_num_threads(1)  # rows are short: threads cost more than they bring


def new_request(
    slot: int, prompt: list[int], output: list[int] | None = None, seed: int = 7, **params: Any
) -> NewRequest:
    """A request with `output` tokens already drawn."""
    tokens = np.array([*prompt, *(output or [])], np.int32)
    return NewRequest(
        slot, tokens, len(prompt), seed, SamplingParams(max_tokens=None, **params), []
    )


def new_sampler(num_slots: int = 16, width: int = 40, **options: Any) -> Sampler:
    """On the CPU."""
    return Sampler(num_slots, width, torch.device("cpu"), eos_token_ids=EOS, **options)


def sample(
    sampler: Sampler, logits: np.ndarray | torch.Tensor, slots: list[int], index: list[int]
) -> list[int]:
    """Token ids, -1 where invalid; `logits` is left as it is."""
    logits = torch.as_tensor(logits, dtype=torch.float32).clone()
    drawn = sampler.sample(logits, np.array(slots, np.int32), np.array(index, np.int32))
    return drawn.token_ids.masked_fill(drawn.tokens[1].bool(), -1).tolist()


def reference_gumbel(seed: int, index: int, width: int) -> np.ndarray:
    """float64 [width], from Python integers."""
    mask = 2**64 - 1

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    gamma = 0x9E3779B97F4A7C15
    key = mix((mix((seed + gamma) & mask) + (index + 1) * gamma) & mask)
    bits = [mix((key + (token + 1) * gamma) & mask) & 0xFFFFFFFF for token in range(width)]
    return np.array([-math.log(-math.log1p(-(b + 0.5) * 2.0**-32)) for b in bits])


def reference_logits(raw: np.ndarray, request: NewRequest, output: list[int]) -> np.ndarray:
    """float64 [width]: everything before the temperature, after `output` was drawn."""
    p = request.params
    x = raw.astype(np.float64)
    prompt = request.token_ids[: request.num_prompt_tokens].tolist()
    for t in range(len(x)):
        if p.allowed_token_ids is not None and t not in p.allowed_token_ids:
            x[t] = -math.inf
        for word in p.bad_words_token_ids:
            rest = word[:-1]
            if word[-1] == t and output[len(output) - len(rest) :] == rest:
                x[t] = -math.inf
        if len(output) < p.min_tokens and t in [*EOS, *p.stop_token_ids]:
            x[t] = -math.inf
        x[t] += p.logit_bias.get(t, 0.0)
        if t in prompt or t in output:
            r = p.repetition_penalty
            x[t] = x[t] / r if x[t] > 0 else x[t] * r
        count = output.count(t)
        x[t] -= p.frequency_penalty * count + p.presence_penalty * (count > 0)
    return x


def reference_kept(x: np.ndarray, p: SamplingParams) -> np.ndarray:
    """bool [width]; `x` are logits / temperature."""
    kept = x >= x.max() + (math.log(p.min_p) if p.min_p else -math.inf)
    kept &= x > -math.inf
    if p.top_k:
        kept &= np.array([(x > v).sum() < p.top_k for v in x])
    mass = np.where(kept, np.exp(x - x.max()), 0.0)
    if p.top_p < 1:
        kept &= np.array([mass[x > v].sum() < p.top_p * mass.sum() for v in x])
    return kept


def reference_draw(raw: np.ndarray, request: NewRequest, output: list[int]) -> int:
    """The token."""
    p = request.params
    x = reference_logits(raw, request, output)
    if p.temperature == 0:
        return int(x.argmax())
    x = x / p.temperature
    noise = reference_gumbel(request.seed, len(output), len(x))
    return int(np.where(reference_kept(x, p), x + noise, -math.inf).argmax())
