# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""From flags to an engine: here every "auto" dies.

RULES are applied in order to a frozen config; each is one function that returns the config it was
given, a changed one, or raises ConfigError. What a rule changed is logged.
"""

import dataclasses
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from llmserve.config.engine import EngineConfig
from llmserve.config.flag import flag_name
from llmserve.config.hf import ModelDescription
from llmserve.core.kv_spec import FullAttentionSpec, KVCacheConfig
from llmserve.core.messages import ModelInfo
from llmserve.engine.core import EngineCore
from llmserve.engine.fingerprint import fingerprint
from llmserve.errors import ConfigError
from llmserve.executor.base import ModelFacts
from llmserve.executor.registry import EXECUTORS
from llmserve.kv_cache.groups import blocks_at_peak, make_kv_cache_config, tokens_that_fit
from llmserve.scheduler.cost import StepCosts
from llmserve.scheduler.scheduler import Scheduler
from llmserve.structured_output.compiler import GrammarCompiler
from llmserve.structured_output.manager import GrammarManager
from llmserve.utils.logger import get_logger
from llmserve.worker.device import DeviceInfo, detect

logger = get_logger(__name__)

_BIG_CARD = 70 << 30  # vLLM's border between its default budgets


@dataclass(frozen=True)
class Facts:
    """What rules may look at besides the config."""

    model: ModelDescription
    device: DeviceInfo


Rule = Callable[[EngineConfig, Facts], EngineConfig]


def _set(config: EngineConfig, group: str, **changes: Any) -> EngineConfig:
    changed = dataclasses.replace(getattr(config, group), **changes)
    return dataclasses.replace(config, **{group: changed})


def refuse_unsupported(config: EngineConfig, facts: Facts) -> EngineConfig:
    """Flags that vLLM users know and that have no meaning here yet."""
    if config.model.trust_remote_code:
        raise ConfigError("--trust-remote-code is not supported: model code is never run")
    if config.model.quantization:
        raise ConfigError(f"--quantization {config.model.quantization} is not supported yet")
    if config.device.tensor_parallel_size != 1:
        raise ConfigError("--tensor-parallel-size above 1 is not supported yet")
    return config


def choose_device(config: EngineConfig, facts: Facts) -> EngineConfig:
    """The device that was found, and its threads."""
    threads = config.device.cpu_threads or max(1, facts.device.cores)
    return _set(config, "device", device=facts.device.kind, cpu_threads=threads)


def choose_dtype(config: EngineConfig, facts: Facts) -> EngineConfig:
    """auto: the checkpoint's on a GPU (float32 becomes float16 there, as in vLLM); on a CPU
    bfloat16 where the processor multiplies it, else float32."""
    dtype = {"half": "float16", "float": "float32"}.get(config.model.dtype, config.model.dtype)
    if dtype == "auto":
        if facts.device.kind == "cpu":
            dtype = "bfloat16" if facts.device.fast_bfloat16 else "float32"
        else:
            dtype = "bfloat16" if facts.model.dtype == "bfloat16" else "float16"
    return _set(config, "model", dtype=dtype)


def choose_context(config: EngineConfig, facts: Facts) -> EngineConfig:
    """The model's own context unless told otherwise; auto (-1) is settled once memory is known."""
    limit = facts.model.max_model_len
    asked = config.model.max_model_len
    if asked is None:
        return _set(config, "model", max_model_len=limit)
    if asked > limit:
        raise ConfigError(
            f"--max-model-len {asked} is more than the {limit} tokens that the model supports"
        )
    return config


def choose_budgets(config: EngineConfig, facts: Facts) -> EngineConfig:
    """Rows and tokens in one step."""
    scheduler = config.scheduler
    cuda, big = facts.device.kind == "cuda", facts.device.memory_bytes >= _BIG_CARD
    seqs = scheduler.max_num_seqs or ((1024 if big else 256) if cuda else 64)
    tokens = scheduler.max_num_batched_tokens
    if tokens is None:
        tokens = max((8192 if big else 2048) if cuda else 512, seqs)
        if not scheduler.enable_chunked_prefill:
            tokens = max(tokens, config.model.max_model_len or 0)
    if tokens < seqs:
        raise ConfigError(
            f"--max-num-batched-tokens {tokens} is less than --max-num-seqs {seqs}: "
            "each running request needs a token a step"
        )
    length = config.model.max_model_len or 0
    if not scheduler.enable_chunked_prefill and tokens < length:
        raise ConfigError(
            f"--no-enable-chunked-prefill needs --max-num-batched-tokens of at least the context, "
            f"{length}, got {tokens}"
        )
    return _set(config, "scheduler", max_num_seqs=seqs, max_num_batched_tokens=tokens)


RULES: list[Rule] = [
    refuse_unsupported,
    choose_device,
    choose_dtype,
    choose_context,
    choose_budgets,
]


def resolve(config: EngineConfig, facts: Facts) -> EngineConfig:
    """Applies RULES and logs what they changed."""
    for rule in RULES:
        changed = rule(config, facts)
        for group in ("model", "cache", "scheduler", "device"):
            old, new = getattr(config, group), getattr(changed, group)
            for field in dataclasses.fields(old):
                if getattr(old, field.name) != getattr(new, field.name):
                    logger.info("%s = %s", flag_name(field.name)[2:], getattr(new, field.name))
        config = changed
    return config


def build(config: EngineConfig, model: ModelDescription) -> tuple[EngineCore, ModelInfo]:
    """Resolves, loads, sizes the cache: an engine that can step."""
    device = detect(config.device.device)
    config = resolve(config, Facts(model, device))
    executor = EXECUTORS.load(config.executor)(config, model)
    facts: ModelFacts = executor.load()
    config, kv = _size_cache(config, model, facts)
    assert config.model.max_model_len is not None and config.scheduler.max_num_seqs is not None
    executor.config = config
    executor.initialize_kv_cache(kv)
    depth = 2 if config.scheduler.async_scheduling else 1
    scheduler = Scheduler(
        config.scheduler,
        config.cache,
        kv,
        max_model_len=config.model.max_model_len,
        logits_width=facts.logits_width,
        eos_token_ids=model.eos_token_ids,
        seed=config.model.seed,
        max_in_flight=depth,
        costs=_step_costs(config, model, facts),
    )
    info = _model_info(config, model, facts, kv, device)
    logger.info(
        "KV cache: %d blocks, %s tokens; up to %.1f requests of %d tokens at once",
        kv.num_blocks - 1,
        f"{info.num_kv_tokens:,}",
        info.num_kv_tokens / config.model.max_model_len,
        config.model.max_model_len,
    )
    grammars = GrammarManager(
        GrammarCompiler(model.tokenizer, facts.logits_width, model.eos_token_ids),
        facts.logits_width,
        config.scheduler.max_num_seqs + 1,
    )
    return EngineCore(scheduler, executor, depth, grammars), info


def _step_costs(
    config: EngineConfig, model: ModelDescription, facts: ModelFacts
) -> StepCosts | None:
    """None where prompts are not to be split, or not for the sake of those who decode."""
    most = config.scheduler.max_inter_token_ms
    if most == 0 or not config.scheduler.enable_chunked_prefill:
        return None
    # multiply-adds of a token: one for each weight, and two of head_dim for each head and token
    # that a layer of full attention looks at
    heads = int(model.hf_config.get("num_attention_heads", 0))
    full = [spec for spec in facts.kv_specs if isinstance(spec, FullAttentionSpec)]
    attention = 2 * heads * sum(spec.head_dim for spec in full)
    weights = facts.weight_bytes / full[0].dtype_bytes if full else 0
    return StepCosts(
        most / 1000 if most else None,
        attention / weights if weights else 0.0,
        least=32 if config.device.device == "cpu" else 64,
    )


def _size_cache(
    config: EngineConfig, model: ModelDescription, facts: ModelFacts
) -> tuple[EngineConfig, KVCacheConfig]:
    """The pool, and the context where it was left to what fits."""
    pool = partial(
        make_kv_cache_config,
        facts.kv_specs,
        config.cache.block_size,
        facts.kv_bytes_available,
        config.cache.num_gpu_blocks_override,
    )
    chunk = config.scheduler.max_num_batched_tokens
    length = config.model.max_model_len
    assert length is not None and chunk is not None
    if length == -1:
        kv = pool()

        def too_long(tokens: int) -> bool:
            needed = sum(blocks_at_peak(group, tokens, chunk) for group in kv.groups)
            return needed > kv.num_blocks - 1

        length = bisect_left(range(1, model.max_model_len + 1), True, key=too_long)
        config = _set(config, "model", max_model_len=length)
    return config, pool(max_model_len=length, max_num_batched_tokens=chunk)


def _model_info(
    config: EngineConfig,
    model: ModelDescription,
    facts: ModelFacts,
    kv: KVCacheConfig,
    device: DeviceInfo,
) -> ModelInfo:
    assert config.model.max_model_len and config.scheduler.max_num_batched_tokens
    defaults = {} if config.model.generation_config == "vllm" else dict(model.generation_defaults)
    return ModelInfo(
        name=model.source.name,
        architecture=model.architecture,
        max_model_len=config.model.max_model_len,
        logits_width=facts.logits_width,
        eos_token_ids=model.eos_token_ids,
        bos_token_id=model.bos_token_id,
        tokenizer="" if config.model.skip_tokenizer_init else model.tokenizer,
        chat_template=model.chat_template,
        generation_defaults=defaults | config.model.override_generation_config,
        dtype=facts.dtype,
        num_kv_tokens=tokens_that_fit(kv, config.model.max_model_len),
        num_kv_blocks=kv.num_blocks - 1,
        block_size=config.cache.block_size,
        weight_bytes=facts.weight_bytes,
        kv_specs=facts.kv_specs,
        max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
        fingerprint=fingerprint(config, model, facts, device.name),
        cache_config={
            field.name: str(getattr(config.cache, field.name))
            for field in dataclasses.fields(config.cache)
        }
        | {"num_gpu_blocks": str(kv.num_blocks - 1)},
        max_num_seqs=config.scheduler.max_num_seqs or 0,
        max_num_queued_reqs=config.scheduler.max_num_queued_reqs,
        max_num_queued_tokens=config.scheduler.max_num_queued_tokens,
        on_gpu=device.kind != "cpu",
        has_priorities=config.scheduler.scheduling_policy == "priority",
    )
