# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import pytest

from llmserve.cli import collect_env
from llmserve.errors import ConfigError


def test_report_hides_secrets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("LLMSERVE_API_KEY", "sk-secret")
    monkeypatch.setenv("HF_HOME", "/somewhere")
    monkeypatch.setenv("UNRELATED_TO_MODELS", "private")
    assert collect_env.run([]) == 0
    out = capsys.readouterr().out
    assert "secret" not in out and "private" not in out
    assert "HF_HOME:             /somewhere" in out and "HF_TOKEN:            (hidden)" in out
    for name in ("python:", "processor:", "memory:", "torch:", "llmserve:"):
        assert name in out
    with pytest.raises(ConfigError, match="takes no options"):
        collect_env.run(["--all"])


def test_missing_package_and_program() -> None:
    assert collect_env.packages()["numpy"][0].isdigit()
    assert collect_env._command("no-such-program-here") is None
    assert collect_env._command("false") is None
    assert collect_env._command("echo", "x") == "x"
