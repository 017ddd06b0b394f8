# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Parsers by name (vLLM's and SGLang's names are known), and the automatic choice."""

from typing import Any

from llmserve.parsers.base import OutputParser, ReasoningParser, ToolParser, Tools
from llmserve.utils.registry import Registry

TOOL_PARSERS = Registry(
    "tool call parser",
    {
        "hermes": "llmserve.parsers.tool.hermes:Hermes",
        "longcat": "llmserve.parsers.tool.hermes:Longcat",
        "llama3_json": "llmserve.parsers.tool.llama_json:LlamaJson",
        "pythonic": "llmserve.parsers.tool.pythonic:Pythonic",
        "lfm2": "llmserve.parsers.tool.pythonic:Lfm2",
        "olmo3": "llmserve.parsers.tool.pythonic:Olmo3",
        "mistral": "llmserve.parsers.tool.mistral:Mistral",
        "mistral_array": "llmserve.parsers.tool.mistral:MistralArray",
        "deepseek_v3": "llmserve.parsers.tool.deepseek_v3:DeepseekV3",
        "deepseek_v31": "llmserve.parsers.tool.deepseek_v3:DeepseekV31",
        "deepseek_v32": "llmserve.parsers.tool.deepseek_v32:DeepseekV32",
        "deepseek_v4": "llmserve.parsers.tool.deepseek_v32:DeepseekV4",
        "deepseek_v41": "llmserve.parsers.tool.deepseek_v32:DeepseekV41",
        "openai": "llmserve.parsers.tool.openai:Harmony",
        "qwen3_coder": "llmserve.parsers.tool.qwen3_coder:Qwen3Coder",
        "seed_oss": "llmserve.parsers.tool.qwen3_coder:SeedOss",
        "glm45": "llmserve.parsers.tool.glm:Glm",
        "hy_v3": "llmserve.parsers.tool.glm:HyV3",
        "kimi_k2": "llmserve.parsers.tool.kimi_k2:KimiK2",
        "kimi_k3": "llmserve.parsers.tool.kimi_k3:KimiK3",
        "minimax_m2": "llmserve.parsers.tool.minimax_m2:MinimaxM2",
        "minimax_m3": "llmserve.parsers.tool.minimax_m3:MinimaxM3",
        "gemma4": "llmserve.parsers.tool.gemma4:Gemma4",
        "functiongemma": "llmserve.parsers.tool.gemma4:FunctionGemma",
        "granite": "llmserve.parsers.tool.granite:Granite",
        "granite-20b-fc": "llmserve.parsers.tool.json_marked:Granite20b",
        "phi4_mini_json": "llmserve.parsers.tool.json_marked:Phi4Mini",
        "internlm": "llmserve.parsers.tool.json_marked:Internlm",
        "jamba": "llmserve.parsers.tool.json_marked:Jamba",
        "cohere_command3": "llmserve.parsers.tool.json_marked:CohereCommand3",
        "apertus": "llmserve.parsers.tool.apertus:Apertus",
        "xlam": "llmserve.parsers.tool.xlam:Xlam",
        "step3": "llmserve.parsers.tool.step3:Step3",
    },
)
REASONING_PARSERS = Registry(
    "reasoning parser",
    {
        "think": "llmserve.parsers.reasoning.think:Think",
        "deepseek_r1": "llmserve.parsers.reasoning.think:ThinkUnopened",
        "seed_oss": "llmserve.parsers.reasoning.think:SeedOss",
        "minimax_m3": "llmserve.parsers.reasoning.think:MinimaxM3",
        "kimi_k3": "llmserve.parsers.reasoning.kimi_k3:KimiK3",
        "mistral": "llmserve.parsers.reasoning.think:Mistral",
        "gemma4": "llmserve.parsers.reasoning.think:Gemma4",
        "cohere_command3": "llmserve.parsers.reasoning.think:Cohere",
        "granite": "llmserve.parsers.reasoning.think:Granite",
        "openai_gptoss": "llmserve.parsers.reasoning.openai_gptoss:HarmonyReasoning",
    },
)
TOOL_ALIASES = {
    "qwen3_json": "hermes", "granite4": "hermes", "qwen": "hermes", "qwen25": "hermes",
    "llama4_json": "llama3_json", "llama3": "llama3_json", "llama4_pythonic": "pythonic",
    "deepseekv3": "deepseek_v3", "deepseekv31": "deepseek_v31", "deepseekv32": "deepseek_v32",
    "deepseekv4": "deepseek_v4", "hunyuan_a13b": "jamba", "gpt-oss": "openai",
    "qwen3_xml": "qwen3_coder", "mimo": "qwen3_coder", "nemotron_v3": "qwen3_coder",
    "step3p5": "qwen3_coder", "glm": "glm45", "glm47": "glm45", "ling3": "glm45",
    "minimax-m2": "minimax_m2", "minimax-m3": "minimax_m3",
}  # fmt: skip
REASONING_ALIASES = {
    "qwen3": "think", "glm45": "think", "glm47": "think", "deepseek_v3": "think",
    "deepseek-v3": "think", "deepseek_v4": "think", "olmo3": "think", "step3": "think",
    "ernie45": "think", "hunyuan_a13b": "think", "hy_v3": "think", "kimi_k2": "think",
    "holo2": "think", "nemotron_v3": "think", "nemotron_3": "think", "deepseek-r1": "deepseek_r1",
    "minimax_m2": "deepseek_r1", "qwen3-thinking": "deepseek_r1", "gpt-oss": "openai_gptoss",
    "granite_thinking_parser": "granite",
}  # fmt: skip

# What a chat template writes, and the format that it then teaches; the first that fits.
_TOOLS_BY_TEXT = (
    (("<|channel|>", "<|start|>"), "openai"),
    (("<|open|>", "<|close|>"), "kimi_k3"),
    (("｜DSML｜ ",), "deepseek_v41"),
    (("｜DSML｜tool_calls",), "deepseek_v4"),
    (("｜DSML｜",), "deepseek_v32"),
    (("<|tool_calls_section_begin|>",), "kimi_k2"),
    (("<minimax:tool_call>",), "minimax_m2"),
    (("]<]minimax[>[",), "minimax_m3"),
    (("<|tool_call>", "<tool_call|>"), "gemma4"),
    (("<tool_sep>", "<arg_key>"), "hy_v3"),
    (("<arg_key>",), "glm45"),
    (("<seed:tool_call>",), "seed_oss"),
    (("<function=", "<parameter="), "qwen3_coder"),
    (("<｜tool▁calls▁begin｜>", "```json"), "deepseek_v3"),
    (("<｜tool▁calls▁begin｜>",), "deepseek_v31"),
    (("[TOOL_CALLS]", "[ARGS]"), "mistral"),
    (("[TOOL_CALLS]",), "mistral_array"),
    (("<longcat_tool_call>",), "longcat"),
    (("<|tool_call|>",), "granite"),
    (("<tool_call>",), "hermes"),
    (("<|tool_call_start|>",), "lfm2"),
    (("<function_calls>",), "olmo3"),
    (("<start_function_call>",), "functiongemma"),
    (("<|START_ACTION|>",), "cohere_command3"),
    (("<|tools_prefix|>",), "apertus"),
    (("<steptml:invoke",), "step3"),
    (("<|action_start|>",), "internlm"),
    (("<tool_calls>",), "jamba"),
    (("functools[",), "phi4_mini_json"),
    (("<function_call>",), "granite-20b-fc"),
    (('[{"name": "tool_call_name", "arguments"',), "xlam"),
    (("<|python_start|>",), "pythonic"),
    (("<|python_tag|>",), "llama3_json"),
    (("Environment: ipython",), "llama3_json"),
    (("[func_name1(",), "pythonic"),
)
_REASONING_BY_TEXT = (
    (("<|channel|>", "<|start|>"), "openai_gptoss"),
    (("<|open|>", "<|close|>"), "kimi_k3"),
    (("<|channel>thought",), "gemma4"),
    (("<minimax:tool_call>",), "deepseek_r1"),
    (("<seed:think>",), "seed_oss"),
    (("<mm:think>",), "minimax_m3"),
    (("[THINK]",), "mistral"),
    (("<|START_THINKING|>",), "cohere_command3"),
    (("<think>",), "think"),
    (("</think>",), "think"),
    (("Here is my thought process:",), "granite"),
)
# For models whose template says nothing.
_TOOLS_BY_ARCHITECTURE = {
    "DeepseekV32ForCausalLM": "deepseek_v32",
    "DeepseekV4ForCausalLM": "deepseek_v32",
    "GptOssForCausalLM": "openai",
    "MistralForCausalLM": "mistral",
    "Mistral3ForConditionalGeneration": "mistral",
}
_REASONING_BY_ARCHITECTURE = {
    "GptOssForCausalLM": "openai_gptoss",
    "DeepseekV32ForCausalLM": "think",
    "DeepseekV4ForCausalLM": "think",
}


class Parsers:
    """The two formats of one model; None where it has none."""

    def __init__(
        self, tool: type[ToolParser] | None, reasoning: type[ReasoningParser] | None
    ) -> None:
        self.tool = tool
        self.reasoning = reasoning
        self.markers = frozenset(
            (*(tool.markers if tool else ()), *(reasoning.markers if reasoning else ()))
        )

    def parses(self, tools: Tools | None) -> bool:
        """Whether an output may hold more than content. Without `tools` there are no calls."""
        return self.reasoning is not None or (self.tool is not None and tools is not None)

    def make(
        self,
        tools: Tools | None,
        prompt: str,
        continued: bool,
        *,
        allowed: frozenset[str] | None = None,
        max_calls: int | None = None,
    ) -> OutputParser:
        """For one output. See `parses`, ReasoningParser and OutputParser."""
        reasoning = self.reasoning(prompt, continued) if self.reasoning else None
        tool = self.tool(tools, reasoning) if self.tool and tools is not None else None
        return OutputParser(reasoning, tool, allowed=allowed, max_calls=max_calls)


def choose_parsers(
    template: str, architecture: str, tool: str | None, reasoning: str | None
) -> Parsers:
    """By name, or after the template and the model; "none" is none. ConfigError lists the names.

    A model that was taught no format gets the most common one for its tool calls.
    """
    tool = (
        tool
        or _by_text(_TOOLS_BY_TEXT, template)
        or _TOOLS_BY_ARCHITECTURE.get(architecture)
        or "hermes"
    )
    reasoning = (
        reasoning
        or _by_text(_REASONING_BY_TEXT, template)
        or _REASONING_BY_ARCHITECTURE.get(architecture)
    )
    return Parsers(
        _load(TOOL_PARSERS, TOOL_ALIASES, tool),
        _load(REASONING_PARSERS, REASONING_ALIASES, reasoning),
    )


def _by_text(rules: tuple[tuple[tuple[str, ...], str], ...], template: str) -> str | None:
    return next((name for texts, name in rules if all(t in template for t in texts)), None)


def _load(registry: Registry, aliases: dict[str, str], name: str | None) -> Any:
    if name is None or name == "none":
        return None
    return registry.load(aliases.get(name, name))
