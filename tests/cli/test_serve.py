# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import socket
import stat
import threading
from pathlib import Path

import pytest

from llmserve.cli.serve import is_ready, listen, ready_block, run
from llmserve.config.server import ServerConfig
from llmserve.core.kv_spec import FullAttentionSpec
from llmserve.errors import ConfigError
from tests.helpers.frontend import model_info

INFO = model_info(kv_specs=[FullAttentionSpec(2, 16, 4)] * 2, tokenizer="t", chat_template="c")


def test_a_taken_port_is_one_line() -> None:
    with listen(ServerConfig(port=0)) as first:
        port = first.getsockname()[1]
        with pytest.raises(
            ConfigError, match=f"cannot listen on 127.0.0.1:{port}: Address already"
        ):
            listen(ServerConfig(port=port))


def test_unknown_host_is_one_line() -> None:
    with pytest.raises(ConfigError, match="cannot listen on 203.0.113.1:8000"):
        listen(ServerConfig(host="203.0.113.1"))
    with pytest.raises(ConfigError, match="cannot listen on no.such.host.invalid:8000"):
        listen(ServerConfig(host="no.such.host.invalid"))


def test_unix_socket_replaces_a_stale_one(tmp_path: Path) -> None:
    path = tmp_path / "s"
    listen(ServerConfig(uds=str(path))).close()
    with listen(ServerConfig(uds=str(path))) as sock:
        assert stat.S_ISSOCK(path.stat().st_mode)
        assert "--unix-socket" in ready_block(INFO, ServerConfig(uds=str(path)), sock)


def test_unix_socket_does_not_replace_a_file(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("x")
    with pytest.raises(ConfigError, match="precious"):
        listen(ServerConfig(uds=str(path)))
    assert path.read_text() == "x"


@pytest.mark.parametrize(
    ("status", "ready"), [("200 OK", True), ("503 Service Unavailable", False)]
)
def test_ready_is_what_the_probe_answers(status: str, ready: bool) -> None:
    with listen(ServerConfig(host="0.0.0.0", port=0)) as sock:

        def answer() -> None:
            connection, _ = sock.accept()
            connection.recv(1000)
            connection.sendall(f"HTTP/1.1 {status}\r\n\r\n".encode())
            connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        assert is_ready(sock) is ready
        thread.join()


def test_not_listening_is_not_ready() -> None:
    with listen(ServerConfig(port=0)) as sock:
        clone = socket.socket(sock.family, sock.type)
        clone.bind(("127.0.0.1", 0))
        assert not is_ready(clone)
        clone.close()


def test_ready_block_fits_the_model_and_the_server() -> None:
    with listen(ServerConfig(port=0)) as sock:
        port = sock.getsockname()[1]
        chat = ready_block(INFO, ServerConfig(api_key=["secret"], root_path="/llm"), sock)
        text = ready_block(model_info(tokenizer="t", kv_specs=INFO.kv_specs), ServerConfig(), sock)
        ids = ready_block(model_info(kv_specs=INFO.kv_specs), ServerConfig(), sock)
    assert f"http://127.0.0.1:{port}/llm/v1/chat/completions" in chat
    assert "secret" not in chat and "Authorization: Bearer" in chat
    assert '"prompt": "' in text and "/v1/completions" in text
    assert '"prompt": [1, 2, 3]' in ids
    for block in (chat, text, ids):
        assert block.endswith("Application startup complete.\n")


def test_wrong_flags_end_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match="--port"):
        run(["--port", "70000"])


def test_a_socket_that_is_served_is_not_taken(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with listen(ServerConfig(uds=path)):
        with pytest.raises(ConfigError, match=f"cannot listen on {path}: Address already in use"):
            listen(ServerConfig(uds=path))
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
    with pytest.raises(ConfigError, match="AF_UNIX path too long"):
        listen(ServerConfig(uds=str(tmp_path / ("s" * 120))))
