# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The seams hold for what no family here has: latent attention, its cache and backend, experts."""

import torch
from torch import nn

from llmserve.attention.base import (
    AttentionBackend,
    AttentionMetadata,
    AttentionShape,
    Capabilities,
)
from llmserve.config.hf import ModelDescription, ModelSource
from llmserve.config.load import LoadConfig
from llmserve.core.kv_spec import MLASpec
from llmserve.kernels.rope_write import rope_rows
from llmserve.kernels.silu_mul import gated_act
from llmserve.layers.base import Build, Layer
from llmserve.layers.embedding import Embedding, LMHead
from llmserve.layers.forward_batch import ForwardBatch
from llmserve.layers.linear import Linear
from llmserve.layers.norm import RMSNorm
from llmserve.layers.rotary import cos_sin_cache
from llmserve.model_loader.dummy import fill_dummy
from llmserve.model_loader.loader import load_model
from llmserve.models.interfaces import CausalLM
from llmserve.quantization.unquantized import UnquantizedLinear
from tests.helpers.run_model import prompt_logits, relative_error

CPU = torch.device("cpu")
VOCAB, HIDDEN, LAYERS, HEADS = 64, 32, 2, 4
LATENT, ROPE, NOPE, VALUE = 16, 8, 12, 10
EXPERTS, TOP, INNER = 4, 2, 24
SCALE = (NOPE + ROPE) ** -0.5
ROPE_TABLE = {"rope_type": "default", "rope_theta": 100.0}
DESCRIPTION = ModelDescription(
    source=ModelSource("folder", "", "probe"), hf_config={}, architecture="Probe", dtype="float32",
    max_model_len=128, eos_token_ids=[], bos_token_id=None, generation_defaults={}, tokenizer="",
    chat_template=None,
)  # fmt: skip


class LatentAttention(AttentionBackend):
    """One latent vector a token, keys and values of all heads."""

    capabilities = Capabilities((0,), None, (torch.float32,), window=False, softcap=False, mla=True)

    def plan(self, metadata: AttentionMetadata) -> None:
        pass

    def forward(
        self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata
    ) -> torch.Tensor:
        out, start = torch.empty_like(query), 0
        pairs = zip(metadata.query_lens_cpu, metadata.seq_lens_cpu, strict=True)
        for row, (count, length) in enumerate(pairs):
            latents = kv_cache[metadata.block_table[row].long()].flatten(0, 1)[:length]
            scores = torch.einsum("qhd,kd->hqk", query[start : start + count], latents)
            late = torch.arange(length) > torch.arange(length - count, length)[:, None]
            weights = (scores * self.shape.scale).masked_fill(late, -torch.inf).softmax(-1)
            out[start : start + count] = torch.einsum("hqk,kd->qhd", weights, latents)
            start += count
        return out


class Stacked(Layer):
    """Several matrices in one parameter."""

    def __init__(self, build: Build, *shape: int) -> None:
        super().__init__()
        self.new_parameter("weight", torch.empty(*shape, dtype=build.dtype, device=build.device))


class ProbeLayer(nn.Module):
    """Latent attention, absorbed, then experts."""

    def __init__(self, build: Build, layer_id: int, table: torch.Tensor) -> None:
        super().__init__()
        self.layer_id, self.table = layer_id, table
        self.norm, self.kv_norm = RMSNorm(build, HIDDEN, 1e-6), RMSNorm(build, LATENT, 1e-6)
        self.q_proj = Linear(build, HIDDEN, (HEADS * (NOPE + ROPE),))
        self.kv_a_proj = Linear(build, HIDDEN, (LATENT + ROPE,))
        self.kv_b_key = Stacked(build, HEADS, NOPE, LATENT)
        self.kv_b_value = Stacked(build, HEADS, VALUE, LATENT)
        self.o_proj = Linear(build, HEADS * VALUE, (HIDDEN,))
        self.mlp_norm, self.router = RMSNorm(build, HIDDEN, 1e-6), Linear(build, HIDDEN, (EXPERTS,))
        self.gate_up = Stacked(build, EXPERTS, 2 * INNER, HIDDEN)
        self.down = Stacked(build, EXPERTS, HIDDEN, INNER)

    def forward(self, x: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        kv, count = batch.layers[self.layer_id], len(x)
        query = self.q_proj(x, self.norm.spec).view(count, HEADS, NOPE + ROPE)
        latent, key_rope = self.kv_a_proj(x, self.norm.spec).split((LATENT, ROPE), -1)
        cos, sin = rope_rows(batch.positions, self.table)
        query_rope, key_rope = (
            part * cos + part.roll(ROPE // 2, -1) * sin
            for part in (query[..., NOPE:], key_rope.unsqueeze(1))
        )
        entry = torch.cat((self.kv_norm(latent), key_rope.squeeze(1)), -1)
        kv.cache.view(-1, LATENT + ROPE)[kv.metadata.slot_mapping] = entry
        absorbed = torch.einsum("thn,hnl->thl", query[..., :NOPE], self.kv_b_key.weight)
        mixed = kv.backend.forward(torch.cat((absorbed, query_rope), -1), kv.cache, kv.metadata)
        value = torch.einsum("thl,hvl->thv", mixed[..., :LATENT], self.kv_b_value.weight)
        x = self.o_proj(value.flatten(1), residual=x)
        return x + self.experts(self.mlp_norm(x))

    def experts(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(TOP)
        out = torch.zeros_like(x)
        for expert in range(EXPERTS):
            token, slot = (chosen == expert).nonzero(as_tuple=True)
            inner = gated_act(x[token] @ self.gate_up.weight[expert].T, "silu")
            share = weights[token, slot].unsqueeze(1)
            out.index_add_(0, token, share * (inner @ self.down.weight[expert].T))
        return out


class Probe(CausalLM):
    def __init__(self, description: ModelDescription, build: Build) -> None:
        super().__init__()
        table = cos_sin_cache(ROPE_TABLE, ROPE, 128, build.max_model_len, build.device)
        self.embed = Embedding(build, VOCAB, HIDDEN)
        self.layers = nn.ModuleList(ProbeLayer(build, id, table) for id in range(LAYERS))
        self.norm = RMSNorm(build, HIDDEN, 1e-6)
        self.lm_head = LMHead(build, self.embed, tied=False)
        self.kv_specs = [MLASpec(LATENT, ROPE, build.dtype.itemsize)] * LAYERS
        self.attention_shapes = [AttentionShape(HEADS, 1, LATENT + ROPE, SCALE)] * LAYERS
        self.logits_width = VOCAB

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        x = self.embed(batch.input_ids)
        for layer in self.layers:
            x = layer(x, batch)
        return self.norm(x)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.lm_head.logits(hidden)


def prompts() -> list[list[int]]:
    return [torch.randint(0, VOCAB, (count,)).tolist() for count in (50, 1, 33)]


def test_dummy_weights_through_the_loader() -> None:
    net = load_model(Probe, DESCRIPTION, LoadConfig(load_format="dummy"), torch.float32, CPU)
    assert net.weight_bytes > 0 and net.kv_specs[0].page_bytes(16) == 16 * 24 * 4
    (logits,) = prompt_logits(net, [[1, 2, 3]], backend=LatentAttention)
    assert logits.shape == (3, VOCAB) and logits.std() > 0


def test_paged_absorbed_chunked_equals_plain() -> None:
    net = Probe(DESCRIPTION, Build(torch.float32, CPU, UnquantizedLinear, 128))
    fill_dummy(net)
    for name, param in net.named_parameters():
        if "norm" not in name:
            param.data *= 300
    params = {name: param.data.double().clone() for name, param in net.named_parameters()}
    for module in net.modules():
        if isinstance(module, Layer):
            module.finalize()
    texts = prompts()
    for chunk in (None, 7):
        out = prompt_logits(net, texts, chunk=chunk, backend=LatentAttention)
        for ours, tokens in zip(out, texts, strict=True):
            assert relative_error(ours, plain(params, tokens)) < 1e-4


def normed(x: torch.Tensor) -> torch.Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


def rotated(x: torch.Tensor) -> torch.Tensor:
    """`x` [tokens, heads, ROPE] at positions 0, 1, ..."""
    angles = torch.arange(len(x))[:, None, None] / 100 ** (torch.arange(0, ROPE, 2) / ROPE).double()
    first, second = x.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def plain(params: dict[str, torch.Tensor], tokens: list[int]) -> torch.Tensor:
    """float64, keys and values of every head written out, every expert computed."""
    x = params["embed.weight"][tokens]
    count = len(tokens)
    for layer in range(LAYERS):
        w = {
            name.removeprefix(f"layers.{layer}.").removesuffix(".weight"): value
            for name, value in params.items()
        }
        h = normed(x)
        query = (h @ w["q_proj"].T).view(count, HEADS, NOPE + ROPE)
        latent, key_rope = (h @ w["kv_a_proj"].T).split((LATENT, ROPE), -1)
        latent = normed(latent)
        key = torch.einsum("tl,hcl->thc", latent, w["kv_b_key"])
        value = torch.einsum("tl,hvl->thv", latent, w["kv_b_value"])
        shared = rotated(key_rope.unsqueeze(1)).expand(-1, HEADS, -1)
        key = torch.cat((key, shared), -1)
        query = torch.cat((query[..., :NOPE], rotated(query[..., NOPE:])), -1)
        scores = torch.einsum("qhd,khd->hqk", query, key) * SCALE
        scores += torch.full((count, count), -torch.inf).triu(1)
        mixed = torch.einsum("hqk,khv->qhv", scores.softmax(-1), value).flatten(1)
        x = x + mixed @ w["o_proj"].T
        h = normed(x)
        weights, chosen = (h @ w["router"].T).softmax(-1).topk(TOP)
        gate, up = torch.einsum("td,eid->tei", h, w["gate_up"]).chunk(2, -1)
        every = torch.einsum("tei,edi->ted", nn.functional.silu(gate) * up, w["down"])
        picked = every.gather(1, chosen.unsqueeze(2).expand(-1, -1, HIDDEN))
        x = x + (weights.unsqueeze(2) * picked).sum(1)
    return normed(x) @ params["lm_head.weight"].T
