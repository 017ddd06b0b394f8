# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from llmserve.config.device import DeviceConfig
from llmserve.core.structured_outputs import GrammarSpec
from llmserve.errors import ConfigError
from llmserve.worker import cuda_graph, model_runner
from llmserve.worker.cuda_graph import StepGraphs, decode_sizes, mixed_sizes
from llmserve.worker.input_batch import PinnedRing, StepInputs
from tests.helpers.tiny_runner import CONFIGS, MAX_MODEL_LEN, VOCABULARY, Driver, random_prompt

DEFAULT = DeviceConfig()
GRAMMAR = GrammarSpec(backend="xgrammar", kind="regex", text="a")


def test_decode_sizes_end_at_the_most_rows() -> None:
    assert decode_sizes(DEFAULT, 1) == [1]
    assert decode_sizes(DEFAULT, 6) == [1, 2, 4, 6]
    assert decode_sizes(DEFAULT, 64)[-3:] == [48, 56, 64]
    for limit in (1, 7, 100, 256, 1024):
        sizes = decode_sizes(DEFAULT, limit)
        assert sizes == sorted(set(sizes)) and sizes[-1] == min(limit, 512)
        assert all(b <= 2 * a or b <= 8 for a, b in zip(sizes, sizes[1:], strict=False))


def test_decode_sizes_of_flags() -> None:
    config = DeviceConfig(max_cudagraph_capture_size=12)
    assert decode_sizes(config, 100) == [1, 2, 4, 8, 12]
    config = DeviceConfig(cudagraph_capture_sizes=[8, 2, 64, 8])
    assert decode_sizes(config, 32) == [2, 8]
    with pytest.raises(ConfigError, match="--cudagraph-capture-sizes must be positive"):
        DeviceConfig(cudagraph_capture_sizes=[4, 0])


def test_mixed_sizes_end_at_the_most_tokens() -> None:
    assert mixed_sizes(DEFAULT, 10) == [10]
    assert mixed_sizes(DEFAULT, 100) == [16, 32, 64, 96, 100]
    assert mixed_sizes(DEFAULT, 16384)[-1] == 2048
    assert mixed_sizes(DeviceConfig(cudagraph_mode="FULL_DECODE_ONLY"), 100) == []

    sizes = mixed_sizes(DeviceConfig(cudagraph_mode="PIECEWISE"), 100)
    assert sizes == [1, 2, 4, 8, 16, 32, 64, 96, 100]


class _Replayed:
    """What a CPU has for a graph: runs again, into the tensors of the first time."""

    def __init__(self, run: Callable[[], torch.Tensor], into: torch.Tensor) -> None:
        self._run = run
        self._into = into

    def replay(self) -> None:
        self._into.copy_(self._run())


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs of whole steps, and copies into their inputs, without CUDA."""

    def record(run: Callable[[], torch.Tensor], pool: Any) -> tuple[list[_Replayed], torch.Tensor]:
        result = run()
        return [_Replayed(run, result)], result

    monkeypatch.setattr(cuda_graph, "record", record)
    monkeypatch.setattr(
        PinnedRing, "send",
        lambda self, target, values: target.copy_(torch.from_numpy(values).view(target.shape)),
    )  # fmt: skip


@pytest.mark.usefixtures("on_cpu")
def test_what_is_replayed_sees_the_inputs_of_an_eager_step() -> None:
    """All that a forward, attention and the gathering of logits read, in random steps of rows that
    decode, go on with their prompt, or end it; padding writes to block 0 and belongs to no row."""
    rng = np.random.default_rng()
    driver = Driver("Gemma3ForCausalLM")
    slots, batcher = driver.runner.slots, driver.runner.batcher
    slots.last_token.copy_(torch.arange(1000, 1009))
    seen: list[StepInputs] = []

    def forward(inputs: StepInputs) -> torch.Tensor:
        seen.append(inputs)
        return inputs.positions.unsqueeze(1).float()

    def draw(
        hidden: torch.Tensor, slots: Any, index: Any, random: bool, words: torch.Tensor | None
    ) -> torch.Tensor:
        told = hidden[:, 0].long() if words is None else words.sum(1)
        return torch.stack((told, torch.full_like(told, random)))

    graphs = StepGraphs(batcher, [1, 3, 8], [16, 40], 8, MAX_MODEL_LEN, (0, 0), forward, draw, 4)
    for slot in range(1, 9):
        driver.add(slot, random_prompt(30, slot))
    kinds = set()
    for _ in range(40):
        left = {slot: driver.total[slot] - driver.computed[slot] for slot in range(1, 9)}
        some = rng.permutation(8)[: rng.integers(1, 9)] + 1
        plan = driver.plan({int(s): int(rng.integers(1, min(left[s], 9) + 1)) for s in some})
        slots.apply(plan.new_requests, plan.new_blocks)
        if (replayed := graphs.replay(plan)) is None:
            continue
        got, hidden = replayed
        static, wanted = seen[-1], batcher.build(plan)
        kinds.add(got.decodes)
        tokens, rows = len(wanted.input_ids), plan.num_rows
        assert hidden[:tokens, 0].tolist() == wanted.positions.tolist()
        for name in ("input_ids", "positions"):
            assert torch.equal(getattr(static, name)[:tokens], getattr(wanted, name))
        for name in ("token_starts", "draw_rows", "draw_slots", "draw_index"):
            assert getattr(got, name).tolist() == getattr(wanted, name).tolist()
        assert torch.equal(got.last_slots, wanted.last_slots)
        if not got.decodes:
            assert torch.equal(got.logits_rows, wanted.logits_rows)
        for ours, eager in zip(static.metadata, wanted.metadata, strict=True):
            width = eager.block_table.shape[1]
            assert torch.equal(ours.seq_lens[:rows], eager.seq_lens)
            assert torch.equal(ours.query_start[: rows + 1], eager.query_start)
            assert torch.equal(ours.block_table[:rows, :width], eager.block_table)
            assert torch.equal(ours.slot_mapping[:tokens], eager.slot_mapping)
            assert not ours.slot_mapping[tokens:].any() and not ours.seq_lens[rows:].any()
            if got.decodes:
                words = rng.integers(-9, 9, (rows, 4), np.int32)
                graphs.gate.words[:rows] = words
                for random in (False, True):
                    drawn = graphs.draw(got, random, None).tolist()
                    assert drawn == [hidden[:rows, 0].tolist(), [random] * rows]
                    drawn = graphs.draw(got, random, graphs.gate.next()).tolist()
                    assert drawn[0] == words.sum(1).tolist()
                assert ours.row_counts is None
            else:
                assert ours.row_counts is not None
                assert ours.row_counts.tolist() == [eager.num_decode_rows, rows]
                assert (ours.query_start[rows:] == tokens).all()
    assert kinds == {False, True}


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["FULL", "FULL_AND_PIECEWISE", "PIECEWISE"])
@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize(
    "params", [{}, {"temperature": 1.0, "seed": 11}, {"grammar": GRAMMAR}], ids=str
)
def test_graph_equals_eager(
    architecture: str, params: dict[str, Any], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token for token, with rows that come and go and prompts beside the decodes; masks of whole
    graphs come before their draw is enqueued or after it."""
    masks = np.random.default_rng(3).integers(0, 1 << 31, (9, -(-VOCABULARY // 32)), np.int32)
    monkeypatch.setattr(model_runner, "MAX_WHOLE", 16)
    prompts = {slot: random_prompt(n, slot) for slot, n in {1: 5, 2: 33, 3: 70}.items()}
    runs = []
    for graphs in (False, True):
        driver = Driver(architecture, device="cuda")
        driver.masks = masks if "grammar" in params else None
        if graphs:
            driver.runner.capture(mode, [1, 2, 4], [16, 40], 5)
            replays = count_replays(driver.runner)
        out: dict[int, list[int]] = {}
        for slot, prompt in prompts.items():
            driver.add(slot, prompt, **params)
            others = dict.fromkeys(range(1, slot), 1)
            whole = {slot: len(prompt)} if slot < 3 else {slot: 38}
            last = [] if slot < 3 else [others | {slot: 32}]
            decodes = [dict.fromkeys(range(1, slot + 1), 1)] * 6
            for todo in (others | whole, *last, *decodes):
                for row, tokens in driver.step(todo).items():
                    out.setdefault(row, []).extend(tokens)
        runs.append(out)
    # 70 tokens beside two rows are two steps of 40 and 34
    decodes, mixed = {"FULL": (18, 4), "FULL_AND_PIECEWISE": (18, 1), "PIECEWISE": (0, 0)}[mode]
    wanted = {"_replay_decode": decodes, "_replay_mixed": mixed, "replay": 22 - decodes - mixed}
    assert replays == wanted
    assert runs[0] == runs[1]
    if "grammar" in params:
        assert decodes // 2 <= driver.num_late < max(decodes, 1)
        assert all(masks[s, t // 32] >> t % 32 & 1 for s, drawn in runs[0].items() for t in drawn)
    assert len(set(np.concatenate(list(runs[0].values())))) > 3


def count_replays(runner: Any) -> dict[str, int]:
    """Of whole decode steps, whole mixed ones and steps in pieces, from now on."""
    counts: dict[str, int] = {}
    for graphs, names in (
        (runner.graphs, ("_replay_decode", "_replay_mixed")), (runner.pieces, ("replay",)),
    ):  # fmt: skip
        for name in names:
            counts[name] = 0
            if graphs is None:
                continue
            original = getattr(graphs, name)

            def counted(*args: Any, name: str = name, original: Any = original) -> Any:
                counts[name] += 1
                return original(*args)

            setattr(graphs, name, counted)
    return counts
