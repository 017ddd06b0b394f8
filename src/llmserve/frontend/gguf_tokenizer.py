# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""A tokenizer out of GGUF metadata.

The split rules are those that the models' own tokenizer.json files have, under the names that
llama.cpp gives them.
"""

from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from llmserve.config.gguf import read_header
from llmserve.errors import ConfigError

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # tokenizer.ggml.token_type

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CL100K = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|%s| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
    rf"|%s| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
)
_LLAMA3 = (_CL100K % r"\p{N}{1,3}",)
_QWEN2 = (_CL100K % r"\p{N}",)
_DIGITS_GPT2 = (r"\p{N}", _GPT2)
_WORDS_AND_MARKS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_TAIL}"
)
_DEEPSEEK_V3 = (r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _WORDS_AND_MARKS)
_CJK = "[一-龥ࠀ-一가-퟿]+"

# tokenizer.ggml.pre -> the expressions that cut text into words, each applied to the pieces of the
# one before.
SPLITS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2,),
    "phi-2": (_GPT2,),
    "mpt": (_GPT2,),
    "olmo": (_GPT2,),
    "jais": (_GPT2,),
    "smollm": _DIGITS_GPT2,
    "starcoder": _DIGITS_GPT2,
    "refact": _DIGITS_GPT2,
    "command-r": _DIGITS_GPT2,
    "codeshell": _DIGITS_GPT2,
    "exaone": _DIGITS_GPT2,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "falcon3": _LLAMA3,
    "lfm2": _LLAMA3,
    "smaug-bpe": _LLAMA3,
    "dbrx": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "stablelm2": _QWEN2,
    "tekken": (_O200K % ("", "", r"\p{N}"),),
    "gpt-4o": (_O200K % (f"{_CONTRACTIONS}?", f"{_CONTRACTIONS}?", r"\p{N}{1,3}"),),
    "deepseek-v3": _DEEPSEEK_V3,
    "hunyuan-dense": _DEEPSEEK_V3,
    "deepseek-coder": ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}"),
}
# Vocabularies in which a word that is a token is taken whole, whatever the merges say.
_IGNORE_MERGES = {"llama3", "llama-v3", "llama-bpe", "falcon3", "lfm2", "tekken"}
_NFC = {"qwen2", "deepseek-r1-qwen", "stablelm2"}
_ADDS_BOS = {"llama3", "llama-v3", "llama-bpe", "falcon3", "lfm2", "tekken"}


def load(path: str) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer of a GGUF file and its special tokens ("bos_token" -> "<s>" and so on)."""
    metadata = read_header([path]).metadata
    kind = metadata.get("tokenizer.ggml.model")
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in builders:
        known = ", ".join(builders)
        raise ConfigError(f"{path}: tokenizer type {kind!r} is not supported ({known} are)")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    tokenizer = builders[kind](metadata, tokens)
    special, plain = [], []
    for token, token_type in zip(
        tokens, metadata.get("tokenizer.ggml.token_type", ()), strict=False
    ):
        if token_type in (_UNKNOWN, _CONTROL):
            special.append(AddedToken(token, special=True, normalized=False))
        elif token_type == _USER_DEFINED:
            plain.append(AddedToken(token, special=False, normalized=False))
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    special_tokens = {
        f"{ours}_token": tokens[metadata[f"tokenizer.ggml.{theirs}_token_id"]]
        for ours, theirs in names.items()
        if metadata.get(f"tokenizer.ggml.{theirs}_token_id", len(tokens)) < len(tokens)
    }
    _add_template(tokenizer, metadata, kind, special_tokens)
    return tokenizer, special_tokens


def _byte_level(metadata: dict[str, Any], tokens: list[str]) -> Tokenizer:
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in SPLITS:
        raise ConfigError(f"tokenizer.ggml.pre {pre!r} is not supported ({', '.join(SPLITS)} are)")
    merges = []
    for merge in metadata.get("tokenizer.ggml.merges", ()):
        border = merge.find(" ", 1)  # a piece may start with a space, so not the first one
        merges.append((merge[:border], merge[border + 1 :]))
    tokenizer = Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(tokens)},
            merges,
            ignore_merges=pre in _IGNORE_MERGES,
        )
    )
    if pre in _NFC:
        tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in SPLITS[pre]]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: dict[str, Any], tokens: list[str]) -> Tokenizer:
    vocab = {token: i for i, token in enumerate(tokens)}
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    tokenizer = Tokenizer(
        models.BPE(
            vocab,
            _merges(vocab, metadata["tokenizer.ggml.scores"]),
            unk_token=tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    steps = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tail = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *tail]
    )
    return tokenizer


def _merges(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to make a token of two, best score first: SentencePiece merges by the result's
    score, BPE by rank."""
    merges = []
    for token, i in vocab.items():
        ways = []
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                ways.append((vocab[left], vocab[right], left, right))
        merges += [(-scores[i], -len(way[2]), -len(way[3]), *way) for way in sorted(ways)]
    merges.sort(key=lambda merge: merge[:3])
    return [(merge[5], merge[6]) for merge in merges]


def _add_template(
    tokenizer: Tokenizer, metadata: dict[str, Any], kind: str, special: dict[str, str]
) -> None:
    pre = metadata.get("tokenizer.ggml.pre", "default")
    adds_bos = metadata.get("tokenizer.ggml.add_bos_token", kind == "llama" or pre in _ADDS_BOS)
    adds_eos = metadata.get("tokenizer.ggml.add_eos_token", False)
    before = [special["bos_token"]] if adds_bos and "bos_token" in special else []
    after = [special["eos_token"]] if adds_eos and "eos_token" in special else []
    if before or after:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in before + after],
        )
