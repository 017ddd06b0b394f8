# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""`llmserve tune-kernels`: measured tiles of linear layers for the card that is there."""

import argparse
from pathlib import Path

from llmserve import envs
from llmserve.config.engine import EngineConfig
from llmserve.config.hf import describe
from llmserve.errors import ConfigError
from llmserve.kernels.fused_linear import TABLES
from llmserve.kernels.tune import Bench, Product, known_products, tune
from llmserve.models.common import DecoderConfig, Fields
from llmserve.models.registry import MODELS
from llmserve.worker.device import present_card

_LOG = "tune-kernels.jsonl"


def products_of(decoder: DecoderConfig) -> list[Product]:
    """A layer's four products, as layers/ runs them."""
    hidden, inner = decoder.hidden_size, decoder.intermediate_size
    heads = decoder.num_heads * decoder.head_dim
    qkv = heads + 2 * decoder.num_kv_heads * decoder.head_dim
    return [
        Product(qkv, hidden, True, None, False, decoder.qkv_bias),
        Product(hidden, heads, False, None, True, decoder.o_bias),
        Product(inner, hidden, True, decoder.activation, False, decoder.mlp_bias),
        Product(hidden, inner, False, None, True, decoder.mlp_bias),
    ]


def products_of_model(model: str) -> list[Product]:
    """From the config of a folder, a config.json, a GGUF file or a model on the hub."""
    if model.endswith("config.json"):
        model = str(Path(model).resolve().parent)
    config = EngineConfig.from_flags(model=model, load_format="dummy", skip_tokenizer_init=True)
    description = describe(config.model, config.load)
    decoder = MODELS.load(description.architecture).read(Fields(description.hf_config))
    return products_of(decoder)


def run(argv: list[str]) -> int:
    """Exit code 1 where the time limit left sizes to measure."""
    parser = argparse.ArgumentParser(
        prog="llmserve tune-kernels",
        description="Measures tiles for products of few tokens, with weights that no cache holds, "
        "and writes them into the table for this card. Entries of other cards and sizes stay. "
        "What the log has is not measured again.",
    )
    parser.add_argument(
        "models", nargs="*", metavar="MODEL",
        help="folder, config.json or hub id; default: the sizes that the table has",
    )  # fmt: skip
    parser.add_argument(
        "--time-limit", type=float, default=float("inf"), metavar="S",
        help="seconds after which no further size is begun",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, default=TABLES, help="table to write")
    parser.add_argument(
        "--log", type=Path, default=envs.CACHE_DIR / _LOG,
        help="JSON lines of what was measured; a later run goes on from it",
    )  # fmt: skip
    options = parser.parse_args(argv)
    products = [product for model in options.models for product in products_of_model(model)]
    card = present_card()
    if card is None:
        raise ConfigError("tune-kernels measures on a CUDA device, and there is none")
    left = tune(
        card, products or known_products(), options.log, options.output,
        options.time_limit, Bench("cuda"),
    )  # fmt: skip
    if left:
        print(f"{left} sizes are left: run it again with --log {options.log}")
    return int(left > 0)
