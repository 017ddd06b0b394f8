# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""T17 and T32: logits that are no numbers, and how streams end at each stage of an error; T23: more
requests than there are blocks."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from safetensors.torch import load_file, save_file

from tests.helpers.faults import MAX_MODEL_LEN, Bench, run_stream, write_bench_model
from tests.helpers.invariants import check_streams

NAN_ID = 383  # no token of the tokenizer; where it was read, the logits are NaN


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A server whose model has one token behind which its logits are NaN, though all weights are
    finite: dimension 0 of the residual is zero but for that token, where the last norm overflows,
    and the head multiplies it by zero."""
    folder = write_bench_model(tmp_path_factory.mktemp("poisoned"))
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"][:, 0] = 0.0
    tensors["model.embed_tokens.weight"][NAN_ID] = 0.0
    tensors["model.embed_tokens.weight"][NAN_ID, 0] = 1e6
    for layer in range(2):
        tensors[f"model.layers.{layer}.self_attn.o_proj.weight"][0] = 0.0
        tensors[f"model.layers.{layer}.mlp.down_proj.weight"][0] = 0.0
    tensors["model.norm.weight"][0] = 3e38
    tensors["lm_head.weight"][:, 0] = 0.0
    tensors["lm_head.weight"][NAN_ID] = 0.0  # so that nobody draws it by himself
    save_file(tensors, path, {"format": "pt"})
    with Bench(folder) as bench:
        yield bench


def test_t17_nan_row(poisoned: Bench) -> None:
    """It ends with an error of its own; nothing of it is cached, nobody else sees its blocks."""
    prompt = [11 + n % 300 for n in range(200)]
    golden = poisoned.complete(prompt[:150], 8)["token_ids"]
    assert poisoned.http.post("/v1/completions", json={"prompt": [5], "max_tokens": 1})
    with poisoned.load_and_invariants():
        for _ in range(3):
            body = {"prompt": [*prompt, *prompt, NAN_ID], "max_tokens": 8}
            failed = poisoned.http.post("/v1/completions", json=body)
            assert failed.status_code == 500
            assert failed.json()["error"]["code"] == "numerical_error"
            assert failed.headers["x-should-retry"] == "false"
        assert poisoned.complete(prompt[:150], 8)["token_ids"] == golden
        body = {"prompt": prompt, "max_tokens": 1}
        again = poisoned.http.post("/v1/completions", json=body).json()
        # 150 tokens came before and are cached; the 200 of the failed ones are not
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 144


STAGES = [
    ("body", "integer_below_min_value", 400),
    ("prompt", "context_length_exceeded", 400),
    ("first", "numerical_error", 500),
    ("later", "numerical_error", 500),
]


@pytest.mark.parametrize(
    ("route", "stage", "code", "status"),
    # a chat prompt has the tokens of its text alone, so that its first row cannot be broken
    [("completions", *stage) for stage in STAGES]
    + [("chat", *stage) for stage in STAGES if stage[0] != "first"],
)
def test_t32_stream_endings(
    poisoned: Bench, route: str, stage: str, code: str, status: int
) -> None:
    """One ending, streamed or not; what fails before the first token is no stream at all, and
    OpenAI's client raises."""
    extra: dict[str, Any] = {"ignore_eos": True}
    fields: dict[str, Any] = {"max_tokens": 8}
    text = "hello"
    if stage == "body":
        fields["max_tokens"] = -1
    elif stage == "prompt":
        text = "word " * 3 * MAX_MODEL_LEN
    elif stage == "later":
        # drawn once in a few dozen tokens, and then read
        extra |= {"allowed_token_ids": [*range(40, 80), NAN_ID], "temperature": 1.0, "seed": 3}
        fields["max_tokens"] = 1500
    elif stage == "first":
        extra["add_special_tokens"] = False
    prompt: Any = [7, NAN_ID] if stage == "first" else text
    where = "/v1/completions"
    asked: dict[str, Any] = {"prompt": prompt}
    if route == "chat":
        where = "/v1/chat/completions"
        asked = {"messages": [{"role": "user", "content": text}]}
    with poisoned.load_and_invariants():
        whole = poisoned.http.post(where, json=asked | fields | extra)
        assert whole.status_code == status, whole.text
        assert whole.json()["error"]["code"] == code
        body = asked | fields | extra | {"stream": True}
        with poisoned.http.stream("POST", where, json=body) as answer:
            lines = [line for line in answer.iter_lines() if line]
        if stage == "later":
            assert answer.status_code == 200
            assert sum('"error"' in line for line in lines) == 1 and "[DONE]" not in lines[-1]
            assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == code
        else:
            assert answer.status_code == status
        base = f"{poisoned.server.url}/v1"
        with openai.OpenAI(base_url=base, api_key=poisoned.keys[0], max_retries=0) as client:
            create: Any = client.chat.completions if route == "chat" else client.completions
            for stream in (True, False):
                with pytest.raises(openai.APIError):
                    given = create.create(
                        model=client.models.list().data[0].id,
                        stream=stream,
                        extra_body=extra,
                        **asked,
                        **fields,
                    )
                    list(given)


@pytest.mark.faults
def test_t23_more_requests_than_blocks(bench_model: Path) -> None:
    """A pool of 1.2 requests of full length: all come to their ends, as if alone."""
    with Bench(bench_model, "--num-gpu-blocks-override", "154") as bench:
        solos = [bench.solo(f"{n} " * (20 + 12 * n), 220) for n in range(16)]
        before = bench.server.metrics()
        with bench.load_and_invariants(), ThreadPoolExecutor(16) as pool:
            ended = list(
                pool.map(
                    lambda n: run_stream(bench.http, n, solos[n].prompt, 220), range(len(solos))
                )
            )
            metrics = bench.server.metrics()
        assert not check_streams(solos, ended, may_fail=False)
        preempted = metrics["vllm:num_preemptions_total"] - before["vllm:num_preemptions_total"]
        assert preempted > 0, "the pool was large enough"
        many = "vllm:request_num_preemptions_bucket"
        assert metrics[f"{many}{{5.0}}"] == metrics[f"{many}{{+Inf}}"]
