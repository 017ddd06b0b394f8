# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""penalize token by token, in torch and in interpreted Triton; compiled for both targets."""

import numpy as np
import pytest
import torch

from llmserve import envs
from llmserve.kernels import penalties as module
from llmserve.kernels.penalties import penalize
from tests.helpers.compile_kernel import ARCHITECTURES, compile_for
from tests.helpers.paged import run_interpreted

torch.set_num_threads(1)

NEUTRAL = (1.0, 0.0, 0.0)


@pytest.mark.parametrize(("m", "width"), [(0, 9), (1, 7), (3, 4097), (4, 300)])
def test_equals_the_definition(m: int, width: int) -> None:
    rng = np.random.default_rng()
    state = rng.integers(0, 6, (m + 2, width), dtype=np.int32)
    slots = rng.permutation(m + 2)[:m]
    strength = rng.uniform(0.5, 2, (m, 3)).astype(np.float32)
    strength[:1], strength[1:2, 0], strength[2:3, 1:] = NEUTRAL, 1.0, -0.7
    raw = rng.normal(size=(m, width)).astype(np.float32) * 3
    raw[:, :1] = np.nan
    logits = torch.from_numpy(raw.copy())
    penalize(logits, torch.from_numpy(state), torch.from_numpy(slots), torch.from_numpy(strength))
    seen, times = state[slots] > 0, (state[slots] >> 1).astype(np.float64)
    repetition, frequency, presence = strength.astype(np.float64).T[:, :, None]
    wanted = np.where(seen, np.where(raw > 0, raw / repetition, raw * repetition), raw)
    wanted = wanted - times * frequency - (times > 0) * presence
    np.testing.assert_allclose(logits.numpy(), wanted, rtol=1e-5, atol=1e-5)


if not envs.TRITON_INTERPRET:

    def test_interpreted() -> None:
        run_interpreted(__file__)

    @pytest.mark.parametrize("arch", ARCHITECTURES)
    def test_compiles(arch: int) -> None:
        types = {"logits": "*fp32", "state": "*i32", "slots": "*i64", "strength": "*fp32",
                 "width": "i32"}  # fmt: skip
        compile_for(arch, module._penalize_kernel, types, BLOCK=4096)

    @pytest.mark.gpu
    def test_gpu_equals_torch() -> None:
        m, width = 37, 151_936
        logits = torch.randn(m, width, device="cuda") * 4
        state = torch.randint(0, 6, (64, width), dtype=torch.int32, device="cuda")
        slots = torch.randperm(64, device="cuda")[:m]
        strength = torch.rand(m, 3, device="cuda") + 0.5
        wanted = logits.clone()
        module.penalize_torch(wanted, state, slots, strength)
        penalize(logits, state, slots, strength)
        torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)
