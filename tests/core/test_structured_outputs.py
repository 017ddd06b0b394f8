# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import msgspec
import pytest

from llmserve.core.sampling_params import SamplingParams
from llmserve.core.structured_outputs import GrammarSpec, StructuredOutputsParams
from llmserve.errors import RequestError


def test_exactly_one_kind() -> None:
    assert StructuredOutputsParams(json={}).kind == "json"
    assert StructuredOutputsParams(json_object=False).kind == "json_object"
    for params in (StructuredOutputsParams(), StructuredOutputsParams(json={}, regex="a")):
        with pytest.raises(RequestError, match="exactly one of"):
            _ = params.kind


def test_both_forms_cross_the_sockets() -> None:
    spec = GrammarSpec(backend="xgrammar", kind="json", text="{}", ignored=["#/a"])
    asked = StructuredOutputsParams(json={"type": "object"}, strict=False)
    params = SamplingParams(grammar=spec, structured_outputs=asked)
    data = msgspec.msgpack.encode(params)
    assert msgspec.msgpack.decode(data, type=SamplingParams) == params


def test_the_field_is_not_part_of_the_grammar() -> None:
    one = GrammarSpec(backend="x", kind="json", text="{}", param="a")
    assert one.key == GrammarSpec(backend="x", kind="json", text="{}", param="b").key
    assert one.key != GrammarSpec(backend="x", kind="json", text="{}", compact=True).key
