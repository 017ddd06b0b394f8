# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Paged attention by the project's own Triton kernels: every install with a GPU has it."""

import torch

from llmserve import envs
from llmserve.attention.base import Capabilities, PagedAttention


class TritonPagedAttention(PagedAttention):
    """Split-KV decode for rows of one token, a prefill kernel for the others."""

    capabilities = Capabilities(
        families=(8, 9, 10, 12, *([0] if envs.TRITON_INTERPRET else [])),
        head_dims=tuple(range(16, 257, 16)),
        dtypes=(torch.float32,)
        if envs.TRITON_INTERPRET  # its bfloat16 arithmetic is wrong
        else (torch.bfloat16, torch.float16, torch.float32),
        window=True,
        softcap=True,
        graph="mixed",
    )
