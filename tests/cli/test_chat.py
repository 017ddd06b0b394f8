# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import pytest

from llmserve.cli import chat
from llmserve.cli.client import Client
from tests.helpers.fake_openai import fake_openai


def test_conversation_keeps_its_history(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["hi", "", "again"])

    def read(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    with fake_openai(["Hello", " you"]) as server:
        argv = ["--url", server.url, "--system-prompt", "Be brief.", "--max-tokens", "9"]
        assert chat.run(argv) == 0
        first, second = server.bodies("/v1/chat/completions")
    assert capsys.readouterr().out.count("Hello you\n") == 2
    assert first["model"] == "fake/model" and first["max_tokens"] == 9
    assert [m["content"] for m in second["messages"]] == ["Be brief.", "hi", "Hello you", "again"]
    assert [m["role"] for m in second["messages"]] == ["system", "user", "assistant", "user"]


def test_quick_question(capsys: pytest.CaptureFixture[str]) -> None:
    with fake_openai(["Hello"]) as server:
        assert chat.run(["--url", server.url, "--model-name", "m", "-q", "hi"]) == 0
    assert capsys.readouterr().out == "Hello\n"
    assert server.bodies("/v1/chat/completions")[0]["model"] == "m"


def test_interrupt_ends_the_answer_and_keeps_what_came(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    closed = []

    class Events:
        def __iter__(self) -> "Events":
            self.left = 2
            return self

        def __next__(self) -> dict[str, object]:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
            return {"choices": [{"delta": {"content": "Hel"}}]}

        def close(self) -> None:
            closed.append(True)

    client = Client("http://127.0.0.1:1")
    monkeypatch.setattr(client, "stream", lambda path, body: Events())
    messages = [{"role": "user", "content": "hi"}]
    chat.answer(client, {"model": "m"}, messages)
    assert capsys.readouterr().out == "Hel [stopped]\n"
    assert messages[-1] == {"role": "assistant", "content": "Hel"} and closed
