# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Names of blocks: equal exactly for equal histories."""

from hashlib import sha256

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llmserve.core.messages import EngineRequest
from llmserve.core.request import Request
from llmserve.core.sampling_params import SamplingParams
from llmserve.kv_cache.prefix_hash import block_hash, digest, extend_hashes, root_hash


def _request(tokens: list[int], salt: str = "") -> Request:
    message = EngineRequest(
        client=0, request_id=1, prompt=np.array(tokens, np.int32).tobytes(),
        params=SamplingParams(), arrival=0.0, cache_salt=salt,
    )  # fmt: skip
    return Request(message, 1000, frozenset())


def test_bytes_are_these() -> None:
    """The layout, written out once: a change of it would mix old and new shared caches."""
    root = sha256(
        (16).to_bytes(8, "little") + b"llmserve.kv.root" + (1).to_bytes(8, "little") + b"s"
    ).digest()
    assert root_hash("s") == root
    assert block_hash(root, b"\1\0\0\0") == digest(b"llmserve.kv.block", root, b"\1\0\0\0")


@given(st.lists(st.binary(max_size=3), max_size=4), st.lists(st.binary(max_size=3), max_size=4))
def test_fields_do_not_run_into_each_other(a: list[bytes], b: list[bytes]) -> None:
    assert (digest(*a) == digest(*b)) == (a == b) if a and b else True


_TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=13)


@given(_TOKENS, _TOKENS, st.sampled_from(["", "a"]), st.sampled_from(["", "a"]))
def test_equal_exactly_for_equal_histories(
    a: list[int], b: list[int], salt_a: str, salt_b: str
) -> None:
    size = 3
    hashes_a = extend_hashes(_request(a, salt_a), len(a) // size, size)
    hashes_b = extend_hashes(_request(b, salt_b), len(b) // size, size)
    for i, x in enumerate(hashes_a):
        for j, y in enumerate(hashes_b):
            same = i == j and salt_a == salt_b and a[: size * (i + 1)] == b[: size * (j + 1)]
            assert (x == y) == same


def test_grown_bit_by_bit() -> None:
    tokens = list(range(12))
    whole = extend_hashes(_request(tokens), 4, 3)
    request = _request(tokens)
    for n in (1, 1, 3, 2, 4):
        assert extend_hashes(request, n, 3)[:n] == whole[:n]
    assert len(request.block_hashes) == 4
