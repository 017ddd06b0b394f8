# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""A real engine process around the executor that needs no model."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from llmserve.config.engine import EngineConfig
from llmserve.core.messages import EngineOutputs, EngineRequest, RequestExtra
from llmserve.core.sampling_params import SamplingParams
from llmserve.engine.client import EngineClient

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}


def fake_config(folder: Path, *, fake: dict[str, Any] | None = None, **flags: Any) -> EngineConfig:
    """Flags for an engine that draws hashes of what came before; `fake` goes to FakeExecutor."""
    (folder / "config.json").write_text(json.dumps(CONFIG | {"fake": fake or {}}))
    defaults = {"load_format": "dummy", "skip_tokenizer_init": True, "device": "cpu"}
    return EngineConfig.from_flags(model=str(folder), executor="fake", **(defaults | flags))


def request(client: int, request_id: int, prompt: list[int], **params: Any) -> EngineRequest:
    """A greedy request that ends by length."""
    params = {"temperature": 0.0, "ignore_eos": True, "max_tokens": 8} | params
    return EngineRequest(
        client=client,
        request_id=request_id,
        prompt=np.array(prompt, np.int32).tobytes(),
        params=SamplingParams(**params),
        arrival=time.monotonic(),
    )


class Listener:
    """Files what a client hears."""

    def __init__(self, client: EngineClient) -> None:
        self.client = client
        self.tokens: dict[int, list[int]] = {}
        self.extras: dict[int, list[RequestExtra]] = {}
        self.other: list[Any] = []

    def until(self, done: Callable[["Listener"], Any], timeout: float = 10.0) -> "Listener":
        """Listens until `done(self)`; AssertionError after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not done(self):
            assert time.monotonic() < deadline, (self.tokens, self.extras, self.other)
            self.client.wait(0.05)
            for message in self.client.receive():
                if isinstance(message, EngineOutputs):
                    ids = np.frombuffer(message.ids, np.uint32).tolist()
                    values = np.frombuffer(message.tokens, np.int32).tolist()
                    for wire_id, token in zip(ids, values, strict=True):
                        self.tokens.setdefault(wire_id, []).append(token)
                    for wire_id, extra in message.extras.items():
                        self.extras.setdefault(wire_id, []).append(extra)
                    self.other += [message.stats] if message.stats else []
                else:
                    self.other.append(message)
        return self

    def finished(self, wire_id: int) -> str | None:
        """The finish reason, once there is one."""
        return next(
            (e.finish_reason for e in self.extras.get(wire_id, []) if e.finish_reason), None
        )
