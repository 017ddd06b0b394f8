# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Device and kernels."""

from dataclasses import dataclass

from llmserve.config.flag import check_all, flag, positive, up_to


def _all_positive(sizes: list[int]) -> str | None:
    return None if min(sizes, default=1) >= 1 else "must be positive"


@dataclass(frozen=True)
class DeviceConfig:
    """Where the model runs and with which kernels."""

    device: str = flag("auto", "auto is cuda where there is one.", choices=("auto", "cuda", "cpu"))
    attention_backend: str | None = flag(
        None, "Attention kernels: flashinfer, triton_paged, torch; default is the first that fits."
    )
    enforce_eager: bool = flag(False, "Run without CUDA graphs, as --cudagraph-mode NONE.")
    cudagraph_mode: str = flag(
        "FULL",
        "Steps that run as CUDA graphs: FULL is all, FULL_DECODE_ONLY those without prompts, "
        "PIECEWISE all with attention left out, FULL_AND_PIECEWISE those with large prompts.",
        choices=("NONE", "PIECEWISE", "FULL", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE"),
    )
    cudagraph_capture_sizes: list[int] = flag(
        [],
        "Rows of decode steps to capture; default is a ladder.",
        check=_all_positive,
        repeat=True,
    )
    max_cudagraph_capture_size: int | None = flag(
        None, "Most rows of a decode step to capture; default 512.", check=positive
    )
    tensor_parallel_size: int = flag(1, "Not supported yet beyond 1.", check=positive, short="-tp")
    cpu_threads: int | None = flag(
        None, "Threads of the CPU backend; default is the physical cores.", check=up_to(1024)
    )

    def __post_init__(self) -> None:
        check_all(self)
