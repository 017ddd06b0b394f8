# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What is read from a folder, and one line for each thing that cannot be served."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmserve.config.hf import describe
from llmserve.config.load import LoadConfig
from llmserve.config.model import ModelConfig
from llmserve.errors import ConfigError
from tests.helpers.tiny_models import CHAT_TEMPLATE, write_tiny_gguf, write_tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "m", "llama")


def change(path: Path, **changes: Any) -> None:
    """Edits a JSON file; ... removes a key."""
    values = json.loads(path.read_text()) if path.exists() else {}
    values = {key: value for key, value in (values | changes).items() if value is not ...}
    path.write_text(json.dumps(values))


def run(folder: Path, load_format: str = "auto", **flags: Any) -> Any:
    return describe(ModelConfig(model=str(folder), **flags), LoadConfig(load_format=load_format))


def test_a_plain_folder(folder: Path) -> None:
    model = run(folder)
    assert model.source.kind == "folder" and model.source.name == str(folder)
    assert model.source.files == [str(folder / "model.safetensors")]
    assert model.architecture == "LlamaForCausalLM" and model.dtype == "float32"
    assert model.max_model_len == 512 and model.bos_token_id == 0
    assert model.eos_token_ids == [2] and model.generation_defaults == {}
    assert model.tokenizer == str(folder) and model.chat_template == CHAT_TEMPLATE


def test_transformers_4_and_5_configs_read_alike(folder: Path) -> None:
    new = run(folder)
    change(
        folder / "config.json", rope_parameters=..., rope_theta=10000.0, dtype=...,
        torch_dtype="float32",
    )  # fmt: skip
    old = run(folder)
    assert old.hf_config["rope_parameters"] == new.hf_config["rope_parameters"]
    assert old.dtype == new.dtype


def test_eos_of_all_files_in_order(folder: Path) -> None:
    change(folder / "generation_config.json", eos_token_id=[5, 7])
    change(folder / "config.json", eos_token_id=7)
    assert run(folder).eos_token_ids == [5, 7, 2]
    # Without added_tokens_decoder the tokenizer's own file is asked.
    change(folder / "tokenizer_config.json", added_tokens_decoder=..., eos_token="<|im_start|>")
    assert run(folder).eos_token_ids == [5, 7, 1]


def test_generation_defaults(folder: Path, tmp_path: Path) -> None:
    change(folder / "generation_config.json", temperature=0.6, top_k=20, do_sample=True)
    assert run(folder).generation_defaults == {"temperature": 0.6, "top_k": 20}
    assert run(folder, generation_config="vllm").generation_defaults == {}
    change(tmp_path / "generation_config.json", top_p=0.5)
    assert run(folder, generation_config=str(tmp_path)).generation_defaults == {"top_p": 0.5}
    with pytest.raises(ConfigError, match="cannot read .*generation_config.json"):
        run(folder, generation_config=str(tmp_path / "nowhere"))


def test_chat_template_places(folder: Path) -> None:
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    change(folder / "tokenizer_config.json", chat_template=named)
    assert run(folder).chat_template == "D"
    change(folder / "tokenizer_config.json", chat_template=...)
    assert run(folder).chat_template is None
    change(folder / "chat_template.json", chat_template="J")
    assert run(folder).chat_template == "J"
    (folder / "chat_template.jinja").write_text("F")
    assert run(folder).chat_template == "F"


def test_overrides_reach_the_config(folder: Path) -> None:
    model = run(folder, hf_overrides={"max_position_embeddings": 99})
    assert model.hf_config["max_position_embeddings"] == model.max_model_len == 99


def test_multimodal_wrapper_is_its_text_model(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m", "gemma3")
    text = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["Gemma3ForConditionalGeneration"],
                "model_type": "gemma3",
                "eos_token_id": [1, 106],
                "dtype": "bfloat16",
                "text_config": text | {"architectures": None, "dtype": None, "eos_token_id": None},
                "vision_config": {"hidden_size": 7},
            }
        )
    )
    model = run(folder)
    assert model.architecture == "Gemma3ForCausalLM"
    assert model.hf_config["hidden_size"] == 64 and "vision_config" not in model.hf_config
    assert model.hf_config["rope_parameters"].keys() == {"full_attention", "sliding_attention"}


def test_dtype_of_the_weights_where_the_config_is_silent(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m", "llama")
    change(folder / "config.json", dtype=...)
    assert run(folder).dtype == "float32"
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ConfigError, match="not a readable safetensors file"):
        run(folder)


def test_tokenizer_elsewhere(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    with pytest.raises(ConfigError, match="no tokenizer.json"):
        run(folder)
    assert run(folder, tokenizer=str(tmp_path)).tokenizer == str(tmp_path)
    assert run(folder, skip_tokenizer_init=True).tokenizer == str(folder)


def test_dummy_weights_need_no_files(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert run(folder, "dummy").source.files == []


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "remote_code": ({"auto_map": {"AutoModel": "m.M"}}, "own code .auto_map.*never run"),
    "quantized": ({"quantization_config": {"quant_method": "awq"}}, "quantized .awq."),
    "no_architectures": ({"architectures": ...}, "names no architectures"),
    "dtype": ({"dtype": "int4"}, "dtype 'int4' is not supported"),
    "rope": ({"rope_parameters": {"rope_type": "mrope"}}, "rope type 'mrope'"),
    "length": ({"max_position_embeddings": -1}, "must be a count"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(folder: Path, name: str) -> None:
    changes, complaint = REFUSED[name]
    change(folder / "config.json", **changes)
    with pytest.raises(ConfigError, match=complaint) as error:
        run(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["{", "[1]", '"x"', "\xff", "[" * 100_000])
def test_broken_config(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match="cannot read .*config.json"):
        run(folder)


def test_missing_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match="has no config.json"):
        run(folder)


def test_gguf_file(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf", "qwen3")
    model = run(path)
    assert model.source.kind == "gguf" and model.tokenizer == str(path)
    assert model.architecture == "Qwen3ForCausalLM" and model.dtype == "bfloat16"
    assert model.eos_token_ids == [2] and model.bos_token_id == 0
    assert model.chat_template == CHAT_TEMPLATE


def test_neither_torch_nor_transformers_is_imported(folder: Path) -> None:
    code = (
        "import sys; from llmserve.config.hf import describe; "
        "from llmserve.config.model import ModelConfig; "
        "from llmserve.config.load import LoadConfig; "
        f"describe(ModelConfig(model={str(folder)!r}), LoadConfig()); "
        "print({'torch', 'transformers', 'huggingface_hub', 'httpx'} & set(sys.modules))"
    )
    src = Path(__file__).parents[2] / "src"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=src, timeout=60
    )
    assert done.stdout.strip() == "set()", done.stderr
