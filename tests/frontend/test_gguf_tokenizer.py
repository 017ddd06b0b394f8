# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Tokenizers from GGUF metadata, against the tokenizers that the metadata was made of."""

import random
from pathlib import Path

import pytest
from tokenizers import Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from llmserve.config.demo import demo_model
from llmserve.errors import ConfigError
from llmserve.frontend.gguf_tokenizer import SPLITS
from llmserve.frontend.tokenizer import Tokenizer, load_tokenizer
from tests.helpers.frontend import (
    SP_WORDS,
    TEXT,
    byte_level,
    write_byte_level,
    write_sentencepiece,
)

TEXTS = [
    TEXT,
    "don't DON'T we'Re 1234567 3.14",
    "  two  spaces\n\n \t x  ",
    "e\u0301 日本語",
    "<|user|>hi<|end|><think>",
    "",
]


def random_texts(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    alphabet = "abcTHE  \n\t'sdt0123,.;<>é日語😀\u0301"
    return ["".join(rng.choices(alphabet, k=rng.randint(1, 60))) for _ in range(count)]


def reference(pre: str) -> Backend:
    """The same vocabulary with the rule as the models' own files spell it."""
    backend = byte_level()._backend
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.normalizer = normalizers.NFC() if pre == "qwen2" else None
    if pre == "gpt-2":
        backend.pre_tokenizer = gpt2
    elif pre == "smollm":
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), gpt2]
        )
    else:
        digits = {"llama-bpe": r"\p{N}{1,3}", "qwen2": r"\p{N}"}[pre]
        rule = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + "|"
            r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        split = pre_tokenizers.Split(Regex(rule), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, plain])
    return backend


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_byte_level_rules(pre: str, tmp_path: Path) -> None:
    backend = reference(pre)
    path = write_byte_level(tmp_path / "m.gguf", backend, pre, add_bos_token=False)
    tokenizer = load_tokenizer(str(path))
    if pre == "llama-bpe":
        backend.model.ignore_merges = True
    for text in TEXTS + random_texts(6, 200):
        ids = tokenizer.encode(text)
        assert ids == backend.encode(text).ids
        assert tokenizer.decode(ids) == backend.decode(ids)
    assert tokenizer.special_ids == {0, 1} and tokenizer.eos_token == "<|end|>"
    assert tokenizer.token_str(tokenizer.vocab_size - 1) == "<think>"


@pytest.mark.parametrize("pre", SPLITS)
def test_every_rule_keeps_the_text(pre: str) -> None:
    """Whatever the words, they are the text; and letters and digits are cut as the rule says."""
    steps = [pre_tokenizers.Split(Regex(rule), "isolated") for rule in SPLITS[pre]]
    splitter = pre_tokenizers.Sequence(steps)
    for text in TEXTS + random_texts(7, 50):
        words = [word for word, _ in splitter.pre_tokenize_str(text)]
        assert "".join(words) == text
    words = [word for word, _ in splitter.pre_tokenize_str("Hello world 123456")]
    assert words[:2] == ["Hello", " world"]
    longest = max(sum(c.isdigit() for c in word) for word in words)
    one = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "qwen2",
           "deepseek-r1-qwen", "stablelm2", "tekken", "deepseek-coder"}  # fmt: skip
    whole = {"gpt-2", "phi-2", "mpt", "olmo", "jais"}
    assert longest == (1 if pre in one else 6 if pre in whole else 3)


def test_begin_and_end_tokens(tmp_path: Path) -> None:
    def encode(name: str, pre: str, **metadata: object) -> list[int]:
        backend = byte_level()._backend
        path = write_byte_level(tmp_path / f"{name}.gguf", backend, pre, **metadata)
        return load_tokenizer(str(path)).encode("cat")

    bare = encode("a", "gpt-2", bos_token_id=1)
    assert encode("b", "llama-bpe", bos_token_id=1) == [1, *bare]  # such models add it unasked
    assert encode("c", "gpt-2", bos_token_id=1, add_bos_token=True, add_eos_token=True) == [
        1, *bare, 0
    ]  # fmt: skip


def sentencepiece_oracle(text: str, prefix: bool) -> list[int]:
    """Merges the best-scored neighbours until none is left; bytes for what is no token."""
    vocab = {word: 259 + i for i, word in enumerate(SP_WORDS)}
    pieces = list(("▁" if prefix else "") + text.replace(" ", "▁"))
    while True:
        pairs = [
            (vocab[a + b], i)
            for i, (a, b) in enumerate(zip(pieces, pieces[1:], strict=False))
            if a + b in vocab
        ]
        if not pairs:
            break
        _, i = min(pairs)  # scores fall with the id
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    ids: list[int] = []
    for piece in pieces:
        ids += [vocab[piece]] if piece in vocab else [3 + byte for byte in piece.encode()]
    return ids


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(prefix: bool, tmp_path: Path) -> None:
    path = write_sentencepiece(tmp_path / "m.gguf", add_space_prefix=prefix)
    tokenizer = load_tokenizer(str(path))
    rng = random.Random(8)
    texts = ["the cat", "a  the", "日x\n", "thethe cat cats"]
    texts += ["".join(rng.choices("thecats é日😀\n", k=rng.randint(1, 30))) for _ in range(300)]
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids == [1, *sentencepiece_oracle(text, prefix)], text
        assert tokenizer.decode(ids) == text
    extra = tokenizer.encode("<extra>", add_special_tokens=False)
    assert extra == [tokenizer.vocab_size - 1] and extra[0] not in tokenizer.special_ids


def test_what_is_refused(tmp_path: Path) -> None:
    backend = byte_level()._backend
    path = write_byte_level(tmp_path / "a.gguf", backend, "martian")
    with pytest.raises(ConfigError, match="'martian'"):
        load_tokenizer(str(path))
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ConfigError, match=r"cut\.gguf"):
        load_tokenizer(str(cut))


@pytest.fixture(scope="module")
def demo() -> Tokenizer:
    return load_tokenizer(str(demo_model()))


def test_demo_model_round_trips_and_knows_its_turns(demo: Tokenizer) -> None:
    assert (demo.bos_token, demo.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert demo.vocab_size == 49152 and len(demo.special_ids) == 17
    assert demo.encode("Hello world") == [19556, 905]  # of the published tokenizer
    assert demo.encode("<|im_start|>user\n") == [1, 4093, 198]
    for text in TEXTS[:4] + random_texts(9, 50):
        assert demo.decode(demo.encode(text)) == text
    digits = demo.encode("2024")
    assert len(digits) == 4  # this model's rule: one token a digit
