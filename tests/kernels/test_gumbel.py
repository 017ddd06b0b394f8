# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import math

import pytest
import torch

from llmserve import envs
from llmserve.kernels.gumbel import gumbel, gumbel_triton, random_bits, row_key_triton, row_keys
from llmserve.kernels.triton_jit import tl, triton
from tests.helpers.paged import run_interpreted
from tests.helpers.sampling import reference_gumbel


def _keys(seeds: list[int], index: list[int]) -> torch.Tensor:
    return row_keys(torch.tensor(seeds), torch.tensor(index))


def test_equals_the_integer_reference() -> None:
    for seed, index in [(0, 0), (-1, 3), (2**63 - 1, 10**6), (-(2**63), 1), (12345, 2)]:
        noise = gumbel(_keys([seed], [index])[:, None], torch.arange(300))[0].double()
        expected = torch.from_numpy(reference_gumbel(seed, index, 300))
        # u has 24 bits below 1, so E = -log(1 - u) is off by up to 2^-25 * e^E: only where it loses
        tolerance = 2e-6 * expected.abs() + 1e-6 + 1e-7 * (-expected).exp().exp()
        assert ((noise - expected).abs() <= tolerance).all()


def test_a_token_has_one_value_however_it_is_asked() -> None:
    keys = _keys([3, 4, 5], [0, 1, 2])
    whole = gumbel(keys[:, None], torch.arange(5003))
    ids = torch.randint(0, 5003, (3, 37))
    assert torch.equal(gumbel(keys[:, None], ids), whole.gather(1, ids))
    assert torch.equal(gumbel(keys[1:2, None], torch.arange(5003))[0], whole[1])
    assert torch.equal(gumbel(keys[2], torch.tensor(4999)), whole[2, 4999])


def test_seed_index_and_token_each_matter() -> None:
    # Structured inputs (small consecutive numbers) share no bits: every pair differs in about 16
    seeds, index = torch.meshgrid(torch.arange(40), torch.arange(40), indexing="ij")
    keys = row_keys(seeds.flatten(), index.flatten())
    bits = random_bits(keys[:, None], torch.arange(40))
    assert bits.unique().numel() > bits.numel() - 5
    assert row_keys(seeds.flatten(), index.flatten()).unique().numel() == 1600
    for shifted in (bits[1:] ^ bits[:-1], bits[:, 1:] ^ bits[:, :-1]):
        ones = sum(((shifted >> b) & 1).double().mean() for b in range(32))
        assert abs(ones - 16) < 0.1


def test_bits_are_uniform_in_every_byte() -> None:
    bits = random_bits(_keys([9], [4])[:, None], torch.arange(1 << 18)).flatten()
    for shift in (0, 8, 16, 24):
        counts = torch.bincount((bits >> shift) & 255, minlength=256).double()
        chi2 = ((counts - 1024) ** 2 / 1024).sum()
        assert 255 - 5 * math.sqrt(510) < chi2 < 255 + 5 * math.sqrt(510)


def test_noise_is_finite_at_both_ends_and_exact_in_the_winning_tail(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bits = torch.tensor([0, 1, 2, 1000, 2**31, 2**32 - 1])
    monkeypatch.setattr("llmserve.kernels.gumbel.random_bits", lambda keys, ids: ids)
    noise = gumbel(torch.tensor(0), bits)
    expected = [-math.log(-math.log1p(-(b + 0.5) * 2.0**-32)) for b in bits[:-1].tolist()]
    torch.testing.assert_close(
        noise[:-1].double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-6
    )
    assert -3.2 < noise[-1] < -2.7


@triton.jit
def _noise_kernel(seeds, index, out, SIZE: tl.constexpr):
    row = tl.program_id(0)
    key = row_key_triton(tl.load(seeds + row), tl.load(index + row))
    token = tl.arange(0, SIZE)
    tl.store(out + row * SIZE + token, gumbel_triton(key, token))


if envs.TRITON_INTERPRET:

    def test_triton_equals_torch() -> None:
        seeds = torch.tensor([0, -1, 2**63 - 1, -(2**63), *torch.randint(2**62, (4,)).tolist()])
        index = torch.randint(10**6, (8,))
        out = torch.empty(8, 1 << 14)
        _noise_kernel[(8,)](seeds, index, out, SIZE=1 << 14)
        expected = gumbel(row_keys(seeds, index)[:, None], torch.arange(1 << 14))
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)

else:

    def test_interpreted() -> None:
        run_interpreted(__file__)
