# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
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
