# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The demo model's own file: our reading of it against transformers' (which needs accelerate)."""

import pytest
import torch
import transformers

from llmserve.config.demo import demo_model
from tests.helpers.run_model import description_of, load, prompt_logits

TOLERANCE = 1e-3  # of log-probabilities


@pytest.mark.filterwarnings("ignore")
def test_logprobs_equal_transformers() -> None:
    path = demo_model()
    generator = torch.Generator().manual_seed(11)
    prompts = [torch.randint(0, 49152, (n,), generator=generator).tolist() for n in (150, 40, 1)]
    ours = prompt_logits(load(description_of(path), max_model_len=256), prompts, chunk=64)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    with torch.inference_mode():
        for prompt, logits in zip(prompts, ours, strict=True):
            theirs = reference(torch.tensor([prompt])).logits[0]
            assert theirs.shape == logits.shape
            difference = theirs.log_softmax(-1) - logits.log_softmax(-1)
            assert difference.abs().max() < TOLERANCE
            assert logits.std() > 1  # not all alike
