# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""GET /metrics."""

from prometheus_client.parser import text_string_to_metric_families

from tests.helpers.api import open_api


async def test_requests_show_on_the_page() -> None:
    async with open_api(names=["shown", "other"]) as api:
        await api.complete("abc", model="other", n=2)
        answer = await api.client.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain")
        samples = {
            (sample.name, sample.labels.get("finished_reason")): sample
            for family in text_string_to_metric_families(answer.text)
            for sample in family.samples
        }
    assert samples["vllm:generation_tokens_total", None].value == 28
    assert samples["vllm:request_success_total", "stop"].value == 2
    assert samples["vllm:request_params_n_count", None].value == 1
    assert samples["vllm:num_requests_running", None].labels == {
        "model_name": "shown",
        "engine": "0",
    }
    assert samples["process_resident_memory_bytes", None].value > 0


async def test_the_page_is_there_before_the_engine() -> None:
    async with open_api(ready=False) as api:
        text = (await api.client.get("/metrics")).text
    assert "process_cpu_seconds_total" in text and "vllm:" not in text
