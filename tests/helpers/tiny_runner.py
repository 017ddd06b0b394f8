# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""A ModelRunner over a tiny random model, driven by plans written here instead of a scheduler."""

import json
import sys
import time
from typing import Any

import numpy as np
import torch

from llmserve.config.hf import ModelDescription, ModelSource
from llmserve.core.kv_spec import KVCacheConfig
from llmserve.core.sampling_params import SamplingParams
from llmserve.core.scheduler_output import NewRequest, SchedulerOutput, TokenMask
from llmserve.kv_cache.groups import page_bytes, plan_groups
from llmserve.layers.base import Build, Layer
from llmserve.models.interfaces import CausalLM
from llmserve.models.registry import MODELS
from llmserve.quantization.registry import QUANTIZATIONS
from llmserve.sampling.sampler import Sampler
from llmserve.spec_decode.base import Proposer
from llmserve.worker.model_runner import ModelRunner, StepResult

VOCABULARY = 97
MAX_MODEL_LEN = 160
_CONFIG: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": MAX_MODEL_LEN,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
_GEMMA3: dict[str, Any] = _CONFIG | {
    "num_hidden_layers": 4,
    "sliding_window": 20,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "query_pre_attn_scalar": 16,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
    },
}
CONFIGS = {"LlamaForCausalLM": _CONFIG, "Gemma3ForCausalLM": _GEMMA3}


def describe_tiny(architecture: str = "LlamaForCausalLM") -> ModelDescription:
    """A description without files."""
    return ModelDescription(
        source=ModelSource("folder", "/nowhere", "tiny"),
        hf_config=CONFIGS[architecture],
        architecture=architecture,
        dtype="float32",
        max_model_len=MAX_MODEL_LEN,
        eos_token_ids=[],
        bos_token_id=None,
        generation_defaults={},
        tokenizer="",
        chat_template=None,
    )


def tiny_model(architecture: str = "LlamaForCausalLM", device: str = "cpu") -> CausalLM:
    """Weights large enough that attention is peaked and tokens vary."""
    build = Build(
        torch.float32, torch.device(device), QUANTIZATIONS.load("unquantized"), MAX_MODEL_LEN
    )
    model: CausalLM = MODELS.load(architecture)(describe_tiny(architecture), build)
    generator = torch.Generator().manual_seed(3)
    for name, param in model.named_parameters():
        values = torch.randn(param.shape, generator=generator)
        param.data.copy_(1 + 0.2 * values if "norm" in name else 0.25 * values)
    for module in model.modules():
        if isinstance(module, Layer):
            module.finalize()
    return model


class Driver:
    """Slots, blocks and positions kept by hand. `step` takes {slot: tokens to do}."""

    def __init__(
        self,
        architecture: str = "LlamaForCausalLM",
        *,
        attention_backend: str | None = None,
        proposer: Proposer | None = None,
        num_drafts: int = 0,
        device: str = "cpu",
        block_size: int = 16,
        num_slots: int = 9,
    ) -> None:
        model = tiny_model(architecture, device)
        specs = model.kv_specs
        groups = plan_groups(specs, block_size)
        self.kv = KVCacheConfig(
            num_blocks=120,
            page_bytes=page_bytes(specs, block_size),
            num_layers_per_group=max(len(group.layers) for group in groups),
            groups=groups,
        )
        where = torch.device(device)
        self.runner = ModelRunner(
            model,
            self.kv,
            Sampler(num_slots, model.logits_width, where, eos_token_ids=[]),
            num_slots=num_slots,
            max_model_len=MAX_MODEL_LEN,
            dtype=torch.float32,
            device=where,
            attention_backend=attention_backend,
            proposer=proposer,
            num_drafts=num_drafts,
        )
        self.free = list(np.random.default_rng(5).permutation(np.arange(1, 120)))
        self.computed: dict[int, int] = {}
        self.total: dict[int, int] = {}
        self.num_blocks: dict[int, list[int]] = {}
        self.new: list[NewRequest] = []
        self.released: list[int] = []
        self.steps = 0
        self.masks: np.ndarray | None = None  # int32 [num_slots, words]: of all draws from then on
        self.num_late = 0  # masks that were written once their draw was enqueued

    def add(
        self, slot: int, tokens: list[int], num_prompt: int | None = None, **params: Any
    ) -> int:
        """A request enters with the next step; greedy unless told otherwise."""
        params = {"temperature": 0.0, "max_tokens": None} | params
        blocks: list[list[int]] = [[] for _ in self.kv.groups]
        self.new.append(
            NewRequest(
                slot,
                np.array(tokens, np.int32),
                num_prompt or len(tokens),
                params.pop("seed", 0),
                SamplingParams(**params),
                blocks,
            )
        )
        self.computed[slot], self.total[slot] = 0, len(tokens)
        self.num_blocks[slot] = [0] * len(blocks)
        return slot

    def release(self, slot: int) -> None:
        """The request leaves with the next step."""
        self.released.append(slot)

    def plan(
        self, todo: dict[int, int], drafts: int = 0, score: tuple[int, ...] = ()
    ) -> SchedulerOutput:
        """The next step; `drafts` of each single-token row's tokens are added."""
        order = sorted(todo, key=lambda slot: todo[slot] > 1)
        counts = [todo[s] + (drafts if todo[s] == 1 else 0) for s in order]
        num_drafts = [drafts if todo[s] == 1 else 0 for s in order]
        new_blocks = []
        for slot, count in zip(order, counts, strict=True):
            for g, group in enumerate(self.kv.groups):
                while self.num_blocks[slot][g] * group.block_size < self.computed[slot] + count:
                    index = self.num_blocks[slot][g]
                    new_blocks.append((slot, g, index, int(self.free.pop())))
                    self.num_blocks[slot][g] += 1
        starts = [self.computed[s] for s in order]
        ends = [a + n for a, n in zip(starts, counts, strict=True)]
        sample = [end >= self.total[s] for s, end in zip(order, ends, strict=True)]
        self.steps += 1
        plan = SchedulerOutput(
            step=self.steps,
            slots=np.array(order, np.int32),
            num_computed=np.array(starts, np.int32),
            num_scheduled=np.array(counts, np.int32),
            num_drafts=np.array(num_drafts, np.int32),
            sample=np.array(sample),
            new_blocks=np.array(new_blocks, np.int32).reshape(-1, 4),
            new_requests=self.new,
            released=self.released,
            prompt_logprobs=np.array([s in score for s in order]) if score else None,
        )
        self.new, self.released = [], []
        for slot, end, draws in zip(order, ends, sample, strict=True):
            self.computed[slot] = end
            self.total[slot] += draws
        return plan

    def start(self, todo: dict[int, int], **options: Any) -> tuple[SchedulerOutput, StepResult]:
        """Starts a step."""
        plan = self.plan(todo, **options)
        self.runner.forward(plan)
        if self.masks is None:
            return plan, self.runner.sample(plan)
        drawn = plan.slots[plan.sample]
        masks = self.masks[drawn]
        late = self.runner.late_mask() if plan.step % 3 else None
        if late is None:
            plan.mask = TokenMask(drawn, masks)
            return plan, self.runner.sample(plan)
        late.words[:] = 0
        handle = self.runner.sample(plan)
        self.num_late += 1
        time.sleep(0.02)
        ended: Any = handle._time._ended
        is_done = ended.query()
        late.words[:] = masks
        late.release()
        assert not is_done, "the draw did not wait for its mask"
        return plan, handle

    def step(self, todo: dict[int, int], **options: Any) -> dict[int, list[int]]:
        """Runs a step to its end: the tokens that each slot drew."""
        plan, handle = self.start(todo, **options)
        output = handle.result()
        self.output = output
        self.rows = {slot: row for row, slot in enumerate(plan.slots.tolist())}
        drawn = {}
        for row, slot in enumerate(plan.slots.tolist()):
            drawn[slot] = output.token_ids[row, : output.num_tokens[row]].tolist()
            if plan.num_drafts[row]:
                self.total[slot] += len(drawn[slot]) - 1
                self.computed[slot] = self.total[slot] - 1
        return drawn

    def generate(self, slot: int, num_tokens: int, chunks: list[int] | None = None) -> list[int]:
        """Prompt in `chunks`, then one token a step."""
        out: list[int] = []
        for count in chunks or [self.total[slot]]:
            out += self.step({slot: count})[slot]
        while len(out) < num_tokens:
            out += self.step({slot: 1})[slot]
        return out


def random_prompt(length: int, seed: int) -> list[int]:
    """Token ids."""
    return np.random.default_rng(seed).integers(0, VOCABULARY, length).tolist()


def sample_run(architecture: str, attention_backend: str) -> dict[str, Any]:
    """Tokens and prompt log-probabilities of two requests, chunked and batched."""
    driver = Driver(architecture, attention_backend=attention_backend)
    driver.add(1, random_prompt(23, 20), prompt_logprobs=0)
    driver.add(2, random_prompt(40, 21))
    drawn = [driver.step({1: 23, 2: 30}, score=(1,))]
    _, logprobs, _ = driver.output.prompt_logprobs[driver.rows[1]].unpack()
    drawn += [driver.step(todo) for todo in ({1: 1, 2: 10}, {1: 1, 2: 1}, {1: 1, 2: 1})]
    kinds = sorted({type(backend).__name__ for backend in driver.runner.backends.values()})
    return {
        "tokens": [[step[slot] for step in drawn] for slot in (1, 2)],
        "logprobs": logprobs[:, 0].tolist(),
        "backends": kinds,
    }


if __name__ == "__main__":
    print(json.dumps(sample_run(*sys.argv[1:])))
