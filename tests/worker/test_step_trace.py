# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Reading of traces, on traces made up here; and on a GPU, that steps wait for nothing."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from llmserve import envs
from llmserve.worker.step_trace import Event, Trace, copy_bandwidth, read_trace, record
from tests.helpers.dummy_model import gpu_engine, write_dummy_model
from tests.helpers.engine import Engine


def _event(cat: str, name: str, ts: float, dur: float = 1.0, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": args}


WINDOW = _event("user_annotation", "llmserve steps", 100, 900)


def _read(*events: dict[str, Any], num_steps: int = 1) -> Trace:
    return read_trace([WINDOW, *events], num_steps)


@pytest.mark.parametrize(
    "name",
    [
        "cudaStreamSynchronize", "cudaDeviceSynchronize", "cuCtxSynchronize", "cudaMemcpy",
        "cudaMemcpy2D", "cuMemcpyDtoH_v2", "cudaMalloc", "cudaMallocHost", "cudaMallocAsync",
        "cudaFree", "cudaFreeHost", "cudaHostAlloc", "cuMemAlloc_v2", "cudaMemset",
        "cuModuleLoadData", "cuLibraryLoadData",
    ],
)  # fmt: skip
def test_calls_that_block_are_offenders(name: str) -> None:
    trace = _read(
        _event("cuda_runtime", name, 200),
        _event("cuda_driver", name, 300),
        _event("cuda_runtime", name, 50),  # before the window
        _event("cuda_runtime", name, 1000),  # and after it
        _event("cpu_op", name, 400),  # no call of CUDA's
    )
    assert trace.offenders == [f"2 x {name}"]


@pytest.mark.parametrize(
    "name",
    [
        "cudaEventSynchronize", "cudaStreamWaitEvent", "cudaMemcpyAsync", "cuMemcpyDtoHAsync_v2",
        "cudaMemsetAsync", "cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx",
        "cudaGraphLaunch", "cudaEventRecord", "cudaEventQuery", "cudaStreamIsCapturing",
        "cudaFuncGetAttributes", "cudaPointerGetAttributes",
    ],
)  # fmt: skip
def test_calls_that_only_enqueue_are_none(name: str) -> None:
    assert _read(_event("cuda_runtime", name, 200)).offenders == []


def test_copies_are_judged_by_what_is_at_their_ends() -> None:
    names = ["Memcpy DtoH (Device -> Pageable)", "Memcpy HtoD (Pageable -> Device)",
             "Memcpy DtoH (Device -> Pinned)", "Memcpy DtoD (Device -> Device)"]  # fmt: skip
    trace = _read(*(_event("gpu_memcpy", name, 200 + i) for i, name in enumerate(names)))
    assert trace.offenders == [f"1 x {name}" for name in names[:2]]


def test_time_by_kernel_and_idle_share() -> None:
    trace = _read(
        _event("kernel", "long", 200, 60),
        _event("kernel", "short", 250, 20),  # overlaps: 10 more
        _event("kernel", "within", 210, 5),
        _event("gpu_memset", "short", 330, 30),
        _event("kernel", "late", 2000, 30),
        _event("gpu_user_annotation", "llmserve steps", 200, 160),
        num_steps=2,
    )
    assert [(e.name, e.start) for e in trace.work] == [
        ("long", 200), ("within", 210), ("short", 250), ("short", 330)
    ]  # fmt: skip
    assert (trace.span_us, trace.busy_us) == (160, 100)
    assert trace.idle_share == pytest.approx(1 - 100 / 160)
    assert trace.by_kernel() == [(30, 0.5, "long"), (25, 1, "short"), (2.5, 0.5, "within")]


def test_a_trace_of_nothing() -> None:
    trace = Trace(1)
    assert (trace.span_us, trace.busy_us, trace.idle_share, trace.by_kernel()) == (0, 0, 0, [])
    assert Event("kernel", "x", 2.0, 3.0).end == 5.0


def test_records_on_this_machine() -> None:
    """The window is found in a trace that the profiler itself wrote."""
    with record(3) as recorder:
        torch.ones(4).add(1)
    assert recorder.trace == Trace(3)


if not envs.TRITON_INTERPRET:
    KINDS: list[dict[str, Any]] = [
        {},
        {"temperature": 0.8, "top_p": 0.95, "top_k": 50, "seed": 5},
        {"temperature": 1.0, "min_p": 0.1},
        {"logprobs": 3},
        {"temperature": 0.7, "logprobs": 0, "presence_penalty": 0.5, "frequency_penalty": 0.5},
        {"temperature": 1.2, "repetition_penalty": 1.1, "logit_bias": {7: 1.0}},
    ]

    @pytest.fixture(scope="module")
    def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
        folder = write_dummy_model(tmp_path_factory.mktemp("model"))
        made = gpu_engine(folder, max_num_seqs=32, max_num_batched_tokens=512)
        yield made
        made.close()

    def _prompt(length: int) -> list[int]:
        return np.random.default_rng().integers(5, 300, length).tolist()

    def _decode(engine: Engine, num_steps: int) -> None:
        for _ in range(num_steps):
            engine.core.step()
            engine.core.take_outputs()

    def _finish(engine: Engine) -> None:
        while engine.core.has_work:
            _decode(engine, 1)

    @pytest.mark.gpu
    def test_decode_steps_wait_for_nothing(engine: Engine) -> None:
        for _ in range(3):  # what is kept from step to step is there after the first rounds
            for params in KINDS:
                engine.add(_prompt(20), max_tokens=260, **params)
            _decode(engine, 30)
            torch.cuda.synchronize()
            with record(200) as recorder:
                _decode(engine, 200)
            _finish(engine)
        _check(recorder.trace)

    @pytest.mark.gpu
    def test_mixed_steps_wait_for_nothing(engine: Engine) -> None:
        kinds = itertools.cycle(KINDS)
        for _ in range(3):
            torch.cuda.synchronize()
            with record(50) as recorder:
                for _ in range(50):
                    engine.add(_prompt(40), max_tokens=12, **next(kinds))
                    _decode(engine, 1)
            _finish(engine)
        _check(recorder.trace)

    def _check(trace: Trace) -> None:
        assert len(trace.work) > 8 * trace.num_steps  # the window holds the steps
        assert any(call.name == "cudaEventSynchronize" for call in trace.calls)
        assert trace.offenders == []

    @pytest.mark.gpu
    def test_offenders_of_a_real_trace() -> None:
        """What the patterns look for is what the profiler writes."""
        x = torch.ones(1 << 20, device="cuda")
        # More than tests before this one have left in the allocator's cache
        most = max(segment["total_size"] for segment in torch.cuda.memory_snapshot())
        torch.cuda.synchronize()
        with record(1) as recorder:
            x.cpu()
            torch.empty(most + (1 << 28), dtype=torch.uint8, device="cuda").zero_()
            torch.cuda.synchronize()
        found = " ".join(recorder.trace.offenders)
        for name in ("Pageable", "cudaStreamSynchronize", "cudaMalloc", "cudaDeviceSynchronize"):
            assert name in found
        assert recorder.trace.busy_us > 0
        assert 5e11 < copy_bandwidth() < 1e13
