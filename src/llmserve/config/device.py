# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Device and kernels."""

from dataclasses import dataclass

from llmserve.config.flag import check_all, flag, positive


@dataclass(frozen=True)
class DeviceConfig:
    """Where the model runs and with which kernels."""

    device: str = flag("auto", "auto is cuda where there is one.", choices=("auto", "cuda", "cpu"))
    attention_backend: str | None = flag(
        None, "Attention kernels: flashinfer, triton_paged, torch; default is the first that fits."
    )
    enforce_eager: bool = flag(False, "Run without CUDA graphs.")
    tensor_parallel_size: int = flag(1, "Not supported yet beyond 1.", check=positive, short="-tp")
    cpu_threads: int | None = flag(
        None, "Threads of the CPU backend; default is the physical cores.", check=positive
    )

    def __post_init__(self) -> None:
        check_all(self)
