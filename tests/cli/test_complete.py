# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import pytest

from llmserve.cli import complete
from tests.helpers.fake_openai import fake_openai


def test_quick_completion(capsys: pytest.CaptureFixture[str]) -> None:
    with fake_openai([" upon", " a time"]) as server:
        argv = ["--url", server.url, "-q", "Once", "--max-tokens", "7", "--temperature", "0"]
        assert complete.run(argv) == 0
        (body,) = server.bodies("/v1/completions")
    assert capsys.readouterr().out == " upon a time\n"
    assert (body["prompt"], body["max_tokens"], body["temperature"]) == ("Once", 7, 0.0)


def test_each_line_is_a_prompt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["one", "", "two"]

    def read(prompt: str) -> str:
        if not lines:
            raise EOFError
        return lines.pop(0)

    monkeypatch.setattr("builtins.input", read)
    with fake_openai(["."]) as server:
        assert complete.run(["--url", server.url]) == 0
        prompts = [body["prompt"] for body in server.bodies("/v1/completions")]
    assert prompts == ["one", "two"] and capsys.readouterr().out == ".\n.\n\n"
