# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The demo model, greedy and in float32, says what transformers says on the same file."""

import pytest
import torch
import transformers

from llmserve import LLM, SamplingParams
from llmserve.config.demo import demo_model

torch.set_num_threads(1)

NUM_TOKENS = 48
NEAR_TIE = 1e-4  # between the two best logits: either may win
TOLERANCE = 1e-3  # of log-probabilities

PROMPTS = [
    "The sea is",
    "Once upon a time, in a village by the river, there lived a clockmaker who",
    "1, 1, 2, 3, 5, 8, 13,",
    "def quicksort(items):\n    if len(items) < 2:\n        return items\n",
    "Der schnelle braune Fuchs springt über",
    "La capitale de la France est",
    "日本の首都は",
    "Q: What is the boiling point of water in kelvin?\nA:",
    "<|im_start|>user\nWrite a haiku about rain.<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>system\nYou are terse.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n",
    "🦙 emoji 🎉 and",
    "    \n\n\t  indented",
    "SELECT name, COUNT(*) FROM orders WHERE",
    "A",
    '{"name": "Ada", "born": 1815, "languages": [',
    "To be, or not to be, that is the question:",
    "Photosynthesis is the process by which plants " * 12,
    "Dear Sir or Madam,\n\nI am writing to complain about",
    "The derivative of x^2 is 2x. The derivative of x^3 is",
    " ".join(f"{n} bottles of beer on the wall," for n in range(99, 60, -1)),
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_tokens_and_prompt_logprobs_equal_transformers() -> None:
    """Each of our tokens is transformers' choice after the same tokens; so, by induction, the whole
    continuations are equal."""
    path = demo_model()
    params = SamplingParams(
        temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, prompt_logprobs=0
    )
    with LLM(dtype="float32", max_model_len=1024, cpu_threads=1, max_num_batched_tokens=128) as llm:
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        assert llm.get_metrics().num_chunked_prefills > 0
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ties = 0
    lengths = set()
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        prompt_ids = list(output.prompt_token_ids)
        generated = list(output.outputs[0].token_ids)
        assert prompt_ids == tokenizer(prompt).input_ids
        assert len(generated) == NUM_TOKENS
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt_ids + generated[:-1]])).logits[0]
        for position, token in enumerate(generated, len(prompt_ids) - 1):
            best = logits[position].topk(2)
            if token != best.indices[0]:
                assert best.values[0] - best.values[1] < NEAR_TIE, (prompt, position)
                assert token == best.indices[1], (prompt, position)
                ties += 1
        logprobs = logits.log_softmax(-1)
        assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
        assert len(output.prompt_logprobs) == len(prompt_ids)
        for position, token in enumerate(prompt_ids[1:]):
            entry = output.prompt_logprobs[position + 1]
            assert entry is not None
            assert abs(entry[token].logprob - logprobs[position, token]) < TOLERANCE
        lengths.add(len(prompt_ids))
    assert ties < 5
    assert max(lengths) > 300 and len(lengths) > 10
