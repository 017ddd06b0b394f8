# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import socket
import threading

import pytest

from llmserve import envs
from llmserve.cli.client import Client, error_message
from llmserve.errors import ConfigError, LLMServeError
from tests.helpers.fake_openai import fake_openai


def test_stream_yields_events_and_sends_the_key() -> None:
    with fake_openai(["a", "b"]) as server:
        client = Client(server.url + "/v1", "secret")
        events = list(client.stream("/v1/completions", {"prompt": "x"}))
    assert [e["choices"][0]["text"] for e in events if e["choices"]] == ["a", "b"]
    ((_, body, key),) = server.requests
    assert body == {"prompt": "x", "stream": True} and key == "Bearer secret"


def test_model_is_the_first_and_urls_need_no_scheme() -> None:
    with fake_openai() as server:
        assert Client(server.url.removeprefix("http://")).model() == "fake/model"


def test_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(envs, "API_KEY", "from-env")
    with fake_openai() as server:
        list(Client(server.url).stream("/v1/completions", {"prompt": "x"}))
    assert server.requests[0][2] == "Bearer from-env"


def test_failures_are_one_line() -> None:
    with fake_openai() as server:
        client = Client(server.url)
        with pytest.raises(LLMServeError, match="500 from .*: scripted failure"):
            list(client.stream("/v1/completions", {"prompt": "fail"}))
        with pytest.raises(LLMServeError, match="ended the answer early"):
            list(client.stream("/v1/completions", {"prompt": "cut"}))
        url = server.url
    with pytest.raises(LLMServeError, match=r"no answer from .*: Connection refused \(start"):
        Client(url).model()
    with pytest.raises(ConfigError, match="--url must look like"):
        Client("ftp://x")


def test_error_message_reads_openai_bodies() -> None:
    assert error_message('{"error": {"message": "m"}}') == "m"
    assert error_message("Bad Gateway\nmore") == "Bad Gateway"
    assert error_message("[]") == "[]"


@pytest.mark.parametrize("url", ["http://[", "http://x:abc", "http://x:99999", "http://", ""])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(ConfigError, match="--url must look like"):
        Client(url)


@pytest.mark.parametrize("key", ["\u043a\u043b\u044e\u0447", "a\nb"], ids=["cyrillic", "newline"])
def test_keys_that_no_header_can_carry(key: str) -> None:
    with pytest.raises(ConfigError, match="--api-key must be of printable ASCII"):
        Client("http://x", key)


def test_typed_bytes_that_are_no_utf8_are_replaced() -> None:
    typed = b"a\xffb".decode("utf-8", "surrogateescape")
    with fake_openai() as server:
        list(Client(server.url).stream("/v1/completions", {"prompt": typed + "\u00e9"}))
    assert server.requests[0][1]["prompt"] == "a\ufffdb\u00e9"


@pytest.mark.parametrize("body", [b"<html>", b"{}", b"[1]", b'{"data": [1]}', b'{"data": 3}'])
def test_a_server_of_another_kind_is_one_line(body: bytes) -> None:
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(head + body)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(LLMServeError, match="does not speak the OpenAI API"):
            Client(f"127.0.0.1:{listener.getsockname()[1]}").model()
        thread.join()
