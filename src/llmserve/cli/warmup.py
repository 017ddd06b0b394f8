# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""`llmserve warmup MODEL`: fills Triton's cache with what a start of the model would compile."""

import time
from dataclasses import dataclass

from llmserve.cli.args import parse_flags, take
from llmserve.config.engine import ENGINE_GROUPS, EngineConfig
from llmserve.config.flag import check_all, flag
from llmserve.config.hf import describe
from llmserve.engine.resolve import Facts, build, resolve
from llmserve.errors import ConfigError
from llmserve.kernels.compilations import compilations
from llmserve.worker.compile_steps import compile_steps, parse_cards
from llmserve.worker.device import DeviceInfo, detect
from llmserve.worker.worker import DTYPES

_MEMORY = 80 << 30  # of a card that is not there: it decides on the default number of rows


@dataclass(frozen=True)
class Warmup:
    """For which cards."""

    card: str | None = flag(
        None,
        "Compile for these, like sm_90,sm_120, without one; default is the card that is there.",
    )

    def __post_init__(self) -> None:
        check_all(self)


def warm_absent(config: EngineConfig, cards: str) -> None:
    """Compiles for each of `cards`, and prints how many kernels."""
    description = describe(config.model, config.load)
    for card in parse_cards(cards):
        began, before = time.monotonic(), _kernels()
        device = DeviceInfo("cuda", card.name, card.arch // 10, _MEMORY, True, 0)
        resolved = resolve(config, Facts(description, device))
        rows, length = resolved.scheduler.max_num_seqs, resolved.model.max_model_len
        assert rows is not None and length is not None
        compile_steps(
            description, DTYPES[resolved.model.dtype], card, max_rows=rows,
            max_model_len=length if length > 0 else description.max_model_len,
            block_size=resolved.cache.block_size,
        )  # fmt: skip
        _report(card.name, before, began)


def warm_present(config: EngineConfig) -> None:
    """Starts an engine with dummy weights, graphs and all, and ends it."""
    began, before = time.monotonic(), _kernels()
    core, _ = build(config, describe(config.model, config.load))
    core.shutdown()
    _report(detect("auto").name, before, began)


def _kernels() -> tuple[set[str], set[str]]:
    """Those compiled so far, whoever did it, and those that were there."""
    compiled = set(compilations().compiled)
    return compiled, compilations().found - compiled


def _report(name: str, before: tuple[set[str], set[str]], began: float) -> None:
    compiled, found = (len(now - then) for now, then in zip(_kernels(), before, strict=True))
    print(
        f"{name}: {compiled} kernels compiled, {found} were in the cache, "
        f"{time.monotonic() - began:.1f} s"
    )


def run(argv: list[str]) -> int:
    """Every flag that changes what is launched should be that of the start to come."""
    flags = parse_flags(
        argv, (Warmup, *ENGINE_GROUPS), prog="llmserve warmup",
        description="Fills Triton's cache with the kernels that a start of the model compiles.",
    )  # fmt: skip
    options = take(flags, Warmup)
    config = EngineConfig.from_flags(
        **({"load_format": "dummy", "skip_tokenizer_init": True} | flags)
    )
    compilations().watch()
    if options.card is not None:
        warm_absent(config, options.card)
    elif detect(config.device.device).kind == "cuda":
        warm_present(config)
    else:
        raise ConfigError("there is no CUDA device: name the cards to compile for with --card")
    return 0
