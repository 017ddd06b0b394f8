# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What a model's own files say about it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from llmserve.config import gguf, rope
from llmserve.config.load import LoadConfig
from llmserve.config.model import SAMPLING_DEFAULTS, ModelConfig, sampling_defaults_complaint
from llmserve.config.source import find_source, find_tokenizer, read_json, safetensors_header
from llmserve.errors import ConfigError
from llmserve.utils.guard import guarded
from llmserve.utils.logger import get_logger

logger = get_logger(__name__)

# Multimodal wrappers whose text model is served alone, and the class that serves it.
_TEXT_MODELS = {"Gemma3ForConditionalGeneration": "Gemma3ForCausalLM"}
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float32"}


@dataclass(frozen=True)
class ModelSource:
    """Where the files are, all local by now. `path` is a folder, or the (first) .gguf file."""

    kind: str  # "folder" | "gguf"
    path: str
    name: str  # as the user wrote it, or the demo model's
    files: list[str] = field(default_factory=list)  # weight files, absolute, in order


@dataclass(frozen=True)
class ModelDescription:
    """Everything read from config.json or GGUF metadata, and what stands beside it.

    `hf_config` has Hugging Face's key names, of the text model alone, rope parameters in one form:
    {"rope_type", "rope_theta", ...} under "rope_parameters" (per layer type for Gemma 3).
    `max_model_len` is what the model supports, rope scaling counted in.
    """

    source: ModelSource
    hf_config: dict[str, Any]
    architecture: str
    dtype: str  # of the checkpoint: float32, float16 or bfloat16
    max_model_len: int
    eos_token_ids: list[int]
    bos_token_id: int | None
    generation_defaults: dict[
        str, Any
    ]  # temperature, top_p, top_k, min_p, repetition_penalty, max_new_tokens
    tokenizer: str  # folder with tokenizer.json, or the .gguf file
    chat_template: str | None


def describe(model: ModelConfig, load: LoadConfig) -> ModelDescription:
    """Finds the model (folder, GGUF, hub, demo; downloads it) and reads all but its weights."""
    source = ModelSource(*find_source(model, load))
    if source.kind == "gguf":
        return _describe_gguf(source, model, load)
    return _describe_folder(source, model, load)


def _describe_folder(source: ModelSource, model: ModelConfig, load: LoadConfig) -> ModelDescription:
    folder = Path(source.path)
    if not (folder / "config.json").exists():
        raise ConfigError(f"{source.name} has no config.json")
    config = _text_config(read_json(folder / "config.json") | model.hf_overrides, source.name)
    architecture = _architecture(config, source.name)
    config["rope_parameters"] = rope.normalize(config)
    tokenizer = find_tokenizer(model, load, model.tokenizer) if model.tokenizer else source.path
    if not model.skip_tokenizer_init and not _is_tokenizer(Path(tokenizer)):
        raise ConfigError(f"{tokenizer} has no tokenizer.json (see --tokenizer)")
    own = _optional(folder / "generation_config.json")
    return ModelDescription(
        source=source,
        hf_config=config,
        architecture=architecture,
        dtype=_dtype(config, source.files),
        max_model_len=rope.context_length(config),
        eos_token_ids=_eos_token_ids(own, config, Path(tokenizer)),
        bos_token_id=_first_id(config.get("bos_token_id")),
        generation_defaults=_generation_defaults(model, own),
        tokenizer=tokenizer,
        chat_template=_chat_template(Path(tokenizer)) or _chat_template(folder),
    )


def _describe_gguf(source: ModelSource, model: ModelConfig, load: LoadConfig) -> ModelDescription:
    header = gguf.read_header(source.files or [source.path])
    meta = header.metadata
    config = gguf.hf_config(header, source.path) | model.hf_overrides
    config["rope_parameters"] = rope.normalize(config)
    tokenizer = find_tokenizer(model, load, model.tokenizer) if model.tokenizer else source.path
    own = gguf.generation_defaults(meta)
    return ModelDescription(
        source=source,
        hf_config=config,
        architecture=_architecture(config, source.name),
        dtype=gguf.dtype(header),
        max_model_len=rope.context_length(config),
        eos_token_ids=gguf.eos_token_ids(meta),
        bos_token_id=gguf.token_id(meta, "bos"),
        generation_defaults=_generation_defaults(model, own),
        tokenizer=tokenizer,
        chat_template=_chat_template(Path(tokenizer)) or meta.get("tokenizer.chat_template"),
    )


def _text_config(config: dict[str, Any], name: str) -> dict[str, Any]:
    """The text model's keys of a multimodal wrapper's config; any other config as it is."""
    text = config.get("text_config")
    if not isinstance(text, dict):
        return config
    flat = {key: value for key, value in config.items() if not key.endswith("_config")} | text
    wrapper = config.get("architectures")
    if isinstance(wrapper, list) and wrapper and str(wrapper[0]) in _TEXT_MODELS:
        logger.info("%s is multimodal; its text model alone is served", name)
        wrapper = [_TEXT_MODELS[wrapper[0]]]
    return flat | {"architectures": wrapper}


def _architecture(config: dict[str, Any], name: str) -> str:
    if config.get("auto_map"):
        raise ConfigError(
            f"{name} brings its own code (auto_map in config.json), which is never run"
        )
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise ConfigError(f"{name} is quantized ({method}), which is not supported yet")
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise ConfigError(f"{name}: config.json names no architectures")
    return str(architectures[0])


def _optional(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = read_json(path) if path.exists() else {}
    return value


def _is_tokenizer(path: Path) -> bool:
    return path.suffix == ".gguf" or (path / "tokenizer.json").exists()


def _dtype(config: dict[str, Any], files: list[str]) -> str:
    """config.json's, else that of the first tensor in the first weight file."""
    named = config.get("dtype") or config.get("torch_dtype")
    if named is not None:
        dtype = str(named).removeprefix("torch.")
        if dtype not in _DTYPES.values():
            raise ConfigError(f"config.json: dtype {dtype!r} is not supported")
        return dtype
    if not files:
        return "float32"
    kind = next((info.get("dtype") for info in safetensors_header(files[0]).values()), None)
    for name, dtype in _DTYPES.items():
        if kind == name:
            return dtype
    raise ConfigError(f"{files[0]}: dtype {kind!r} is not supported")


def _first_id(value: Any) -> int | None:
    return next(iter(_ids(value)), None)


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [id for id in values if isinstance(id, int)]


def _eos_token_ids(own: dict[str, Any], config: dict[str, Any], tokenizer: Path) -> list[int]:
    """Of generation_config.json, config.json and the tokenizer's eos_token, in this order."""
    ids = _ids(own.get("eos_token_id")) + _ids(config.get("eos_token_id"))
    if tokenizer.is_dir():
        ids += guarded(
            lambda: _ids_of_eos_token(tokenizer),
            lambda error: _refuse(tokenizer / "tokenizer_config.json", error),
        )
    return list(dict.fromkeys(ids))


def _ids_of_eos_token(tokenizer: Path) -> list[int]:
    settings = _optional(tokenizer / "tokenizer_config.json")
    eos = settings.get("eos_token")
    text = eos.get("content") if isinstance(eos, dict) else eos
    if text is None:
        return []
    added = settings.get("added_tokens_decoder") or {
        token["id"]: token
        for token in _optional(tokenizer / "tokenizer.json").get("added_tokens", [])
    }
    return [int(id) for id, token in added.items() if token.get("content") == text]


def _refuse(file: Path, error: Exception) -> NoReturn:
    """A file that anybody may have written, of other types than it should have."""
    if isinstance(error, ConfigError):
        raise error
    raise ConfigError(f"cannot read {file}: {type(error).__name__}: {error}") from None


def _generation_defaults(model: ModelConfig, own: dict[str, Any]) -> dict[str, Any]:
    if model.generation_config == "vllm":
        return {}
    if model.generation_config != "auto":
        own = read_json(Path(model.generation_config) / "generation_config.json")
    defaults = {name: own[name] for name in SAMPLING_DEFAULTS if own.get(name) is not None}
    if complaint := sampling_defaults_complaint(defaults):
        raise ConfigError(f"{model.model}: generation_config.json {complaint}")
    return defaults


def _chat_template(folder: Path) -> str | None:
    if not folder.is_dir():
        return None
    return guarded(lambda: _read_template(folder), lambda error: _refuse(folder, error))


def _read_template(folder: Path) -> str | None:
    if (path := folder / "chat_template.jinja").exists():
        return path.read_text(encoding="utf-8")
    for file in ("tokenizer_config.json", "chat_template.json"):
        template = _optional(folder / file).get("chat_template")
        if isinstance(template, list):  # named ones; "default" is for plain chats
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if template:
            return str(template)
    return None
