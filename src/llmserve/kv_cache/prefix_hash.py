# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Names of cached blocks: a SHA-256 chain over domain-tagged, length-prefixed fields.

The hash of a block covers everything that its KV depends on: the tokens of the block and of all
blocks before it, and whatever the root was made from. Two different inputs can never be read as the
same bytes: every field carries its length, every use its own tag.
"""

from functools import lru_cache
from hashlib import sha256

from llmserve.core.request import Request


def digest(domain: bytes, *fields: bytes) -> bytes:
    """32 bytes over `domain` and `fields`, each with its length in front."""
    parts = [len(domain).to_bytes(8, "little"), domain]
    for field in fields:
        parts += (len(field).to_bytes(8, "little"), field)
    return sha256(b"".join(parts)).digest()


@lru_cache(maxsize=1024)
def root_hash(cache_salt: str) -> bytes:
    """The parent of a request's first block; requests with different salts share nothing."""
    return digest(b"llmserve.kv.root", cache_salt.encode())


_BLOCK = b"llmserve.kv.block"
_BLOCK_HEAD = len(_BLOCK).to_bytes(8, "little") + _BLOCK + (32).to_bytes(8, "little")


def block_hash(parent: bytes, tokens: bytes | bytearray | memoryview) -> bytes:
    """Of one block: `parent` is the hash before it (32 bytes), `tokens` its int32 ids as bytes.

    Equals `digest(b"llmserve.kv.block", parent, tokens)`; spelled out because it is hot.
    """
    return sha256(_BLOCK_HEAD + parent + len(tokens).to_bytes(8, "little") + tokens).digest()


def extend_hashes(request: Request, num_blocks: int, block_size: int) -> list[bytes]:
    """`request.block_hashes`, grown to at least `num_blocks`, whose tokens are known."""
    hashes = request.block_hashes
    if len(hashes) < num_blocks:
        parent = hashes[-1] if hashes else root_hash(request.cache_salt)
        width = 4 * block_size
        tokens = request.tokens
        for i in range(len(hashes), num_blocks):
            parent = block_hash(parent, tokens[i * width : (i + 1) * width])
            hashes.append(parent)
    return hashes
