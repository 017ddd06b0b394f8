# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What is wrong is told in one 4xx or in one line, and harms nothing."""

import json
import shutil
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.api.test_fields import CASES
from tests.config.test_gguf import HOSTILE
from tests.helpers.clock import calibrate, in_time
from tests.helpers.server import Server, llmserve
from tests.helpers.tiny_models import VOCAB_SIZE, write_tiny_model

CONTEXT = 256  # what the table's limits are for
PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
CANARY = {"prompt": "The quick brown fox", "max_tokens": 16, "temperature": 0}


@pytest.fixture(scope="module")
def server(qwen3: Path) -> Iterator[Server]:
    flags = ["--max-model-len", str(CONTEXT), "--kv-cache-memory-bytes", "16MiB"]
    flags += ["--dtype", "float32", "--cpu-threads", "1", "--disable-uvicorn-access-log"]
    with Server(str(qwen3), *flags) as server:
        yield server


@pytest.fixture
def canary(server: Server) -> Iterator[None]:
    """The server answers afterwards as it did before."""
    golden = server.post("/v1/completions", return_token_ids=True, **CANARY)["choices"]
    yield
    assert server.post("/v1/completions", return_token_ids=True, **CANARY)["choices"] == golden
    server.check_idle()


def body_of(route: str) -> dict[str, Any]:
    body: dict[str, Any] = {"max_tokens": 8}
    if route == "chat":
        return body | {"messages": [{"role": "user", "content": "hi"}]}
    return body | {"prompt": "hi"}


def refusal(server: Server, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The error object of a 4xx."""
    answer = server.http.post(path, content=json.dumps(body), headers=JSON)
    assert 400 <= answer.status_code < 500, (answer.status_code, answer.text)
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and "\n" not in error["message"]
    return error


JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize("route", PATHS)
@pytest.mark.usefixtures("canary")
def test_every_field_out_of_range_and_of_the_wrong_type(server: Server, route: str) -> None:
    cases = [case[1:] for case in CASES if case[0] == route]
    assert len(cases) > 100
    for name, value, code, param in cases:
        if name in ("logit_bias", "allowed_token_ids", "stop_token_ids", "prompt"):
            value = json.loads(json.dumps(value).replace("264", str(VOCAB_SIZE)))
        error = refusal(server, PATHS[route], body_of(route) | {name: value})
        assert (error["param"], error["code"]) == (param or name, code), (name, value)


@pytest.mark.usefixtures("canary")
def test_a_prompt_over_the_context_names_both_numbers(server: Server) -> None:
    messages = [{"role": "user", "content": "hi"}]
    longer = [5] * 300
    for path, body, numbers in (
        ("/v1/completions", {"prompt": longer}, ("300", "256")),
        ("/v1/completions", {"prompt": longer, "max_tokens": 1}, ("300", "256")),
        ("/v1/completions", {"prompt": [5] * 256, "max_tokens": 1}, ("256", "256")),
        ("/v1/completions", {"prompt": "word " * 5000}, ("256",)),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "word " * 5000}]},
            ("256",),
        ),
        ("/v1/chat/completions", {"messages": messages * 200}, ("256",)),
    ):
        error = refusal(server, path, body)
        assert error["code"] == "context_length_exceeded"
        assert all(number in error["message"] for number in numbers), error["message"]


@pytest.mark.usefixtures("canary")
def test_token_ids_outside_the_logits(server: Server) -> None:
    for prompt in ([VOCAB_SIZE], [1, 2**31 - 1], [[3], [VOCAB_SIZE]]):
        assert "prompt" in refusal(server, "/v1/completions", {"prompt": prompt})["param"]
    inside = server.post("/v1/completions", prompt=[VOCAB_SIZE - 1], max_tokens=1)
    assert inside["usage"]["prompt_tokens"] == 1  # an id that the tokenizer has not, but the model


@pytest.mark.usefixtures("canary")
def test_what_is_no_request(server: Server) -> None:
    for content in (b"", b"{", b"[]", b'"x"', b"\xff\xfe", b'{"prompt": NaN}', b"[" * 5000):
        answer = server.http.post("/v1/completions", content=content, headers=JSON)
        assert answer.status_code == 400, content
        assert answer.json()["error"]["type"] == "invalid_request_error"
    assert server.http.post("/v1/nothing", json={}).status_code == 404
    assert server.http.get("/v1/completions").status_code == 405
    host, port = server.url.removeprefix("http://").split(":")
    for raw in (b"\0" * 100, b"GET / HTTP/9.9\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\n"):
        with socket.create_connection((host, int(port))) as sock:
            sock.sendall(raw)


# ---- a model that cannot be served: exit code 2, one last line, no traceback


def _config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def missing(folder: Path) -> None:
    shutil.rmtree(folder)


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def hostile_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")


def unknown_architecture(folder: Path) -> None:
    _config(folder, architectures=["TimeMachineForCausalLM"], model_type="time_machine")


def tensor_missing(folder: Path) -> None:
    _tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))


def wrong_shape(folder: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    _tensors(folder, lambda tensors: tensors.update({name: tensors[name][:, :-8].contiguous()}))


def extra_tensor(folder: Path) -> None:
    extra = {"model.layers.0.self_attn.wormhole.weight": torch.zeros(4)}
    _tensors(folder, lambda tensors: tensors.update(extra))


def remote_code(folder: Path) -> None:
    _config(folder, auto_map={"AutoModelForCausalLM": "modeling_x.X"}, architectures=["X"])
    (folder / "modeling_x.py").write_text("raise SystemExit('this ran')")


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def impossible_sizes(folder: Path) -> None:
    _config(folder, num_key_value_heads=3)


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')


FOLDERS: dict[Callable[[Path], None], str] = {
    missing: "no such file or folder",
    without_config: "config.json",
    truncated: "model.safetensors",
    hostile_header: "model.safetensors",
    unknown_architecture: "TimeMachineForCausalLM",
    tensor_missing: "up_proj",
    wrong_shape: "down_proj",
    extra_tensor: "wormhole",
    remote_code: "code",
    pickle_only: "pytorch_model.bin",
    impossible_sizes: "heads",
    no_tokenizer: "tokenizer",
    broken_tokenizer: "tokenizer",
}


def refused(*arguments: str) -> str:
    """What `llmserve serve` says in its last line before it ends with exit code 2."""
    began = time.monotonic()
    run = llmserve("serve", *arguments, "--port", "0", "--cpu-threads", "1")
    assert run.returncode == 2, run.stdout
    in_time(time.monotonic() - began, 20 * calibrate())
    assert "Traceback" not in run.stdout, run.stdout
    lines = run.stdout.splitlines()
    assert [line for line in lines if line.startswith("llmserve: error: ")] == lines[-1:], lines
    return lines[-1]


@pytest.mark.parametrize("spoil", FOLDERS, ids=lambda spoil: spoil.__name__)
def test_folders(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    folder = write_tiny_model(tmp_path / "model", "qwen3")
    spoil(folder)
    line = refused(str(folder))
    assert FOLDERS[spoil] in line, line
    assert "this ran" not in line


@pytest.mark.parametrize("name", ["past_the_end", "tensor_count"])
def test_hostile_gguf(tmp_path: Path, name: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(HOSTILE[name][0])
    assert str(path) in refused(str(path))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--max-modellen", "5"], "--max-model-len"),
        (["--enable-lora"], "--enable-lora is not supported yet"),
        (["--quantization", "fp8"], "fp8 is not supported yet"),
        (["-tp", "2"], "--tensor-parallel-size"),
        (["--trust-remote-code"], "--trust-remote-code is not supported"),
        (["--task", "embed"], "--task embed is not supported yet"),
        (["--max-model-len", "many"], "--max-model-len"),
        (["--max-model-len", "99999999"], "99999999"),
        (["--block-size", "17"], "--block-size"),
        (["--attention-backend", "psychic"], "psychic"),
        (["--kv-cache-memory-bytes", "1KiB"], "KV"),
        (["--chat-template", "{% if %}"], "chat"),
        (["--logits-processors", "no.such:Thing"], "no.such"),
        (["--config", "/nonexistent.yaml"], "/nonexistent.yaml"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_flags(qwen3: Path, flags: list[str], said: str) -> None:
    assert said in refused(str(qwen3), *flags)


def test_an_old_flag_is_said_to_be_old(qwen3: Path) -> None:
    run = llmserve("serve", str(qwen3), "--swap-space", "4", "--dtype", "fp7")
    assert "--swap-space is an old name without effect" in run.stdout
    assert run.stdout.splitlines()[-1].startswith("llmserve: error: --dtype must be one of")


def test_a_card_that_is_not_there(qwen3: Path) -> None:
    if not torch.cuda.is_available():
        assert "cuda" in refused(str(qwen3), "--device", "cuda").lower()
