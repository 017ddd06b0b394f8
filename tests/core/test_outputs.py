# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
from llmserve import CompletionOutput, RequestOutput


def test_finished_follows_the_reason() -> None:
    output = CompletionOutput(0, "a", [1])
    assert not output.finished()
    output.finish_reason = "stop"
    assert output.finished()


def test_request_output_is_what_vllm_users_read() -> None:
    """outputs[0].text, .token_ids, .finish_reason, prompt_token_ids, num_cached_tokens."""
    output = RequestOutput("r", None, [1, 2], [CompletionOutput(0, "a", [3])], False)
    assert (output.outputs[0].text, output.outputs[0].token_ids) == ("a", [3])
    assert (output.prompt_token_ids, output.num_cached_tokens, output.finished) == (
        [1, 2],
        0,
        False,
    )
