# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""GET /v1/models."""

from tests.helpers.api import CONTEXT, MODEL, open_api


async def test_every_served_name_is_listed_and_found() -> None:
    async with open_api(names=["a", "b/c/d"]) as api:
        cards = (await api.client.get("/v1/models")).json()
        assert cards["object"] == "list"
        assert [card["id"] for card in cards["data"]] == ["a", "b/c/d"]
        for card in cards["data"]:
            assert (await api.client.get(f"/v1/models/{card['id']}")).json() == card
            assert card["object"] == "model" and card["max_model_len"] == CONTEXT
            assert card["parent"] is None and card["root"] == "a"
            answer = await api.chat(model=card["id"])
            assert answer.json()["model"] == card["id"]
        answer = await api.client.get(f"/v1/models/{MODEL}")
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "model_not_found"


async def test_without_given_names_the_model_has_its_own() -> None:
    async with open_api() as api:
        assert (await api.client.get("/v1/models")).json()["data"][0]["id"] == MODEL
        body = {"messages": [{"role": "user", "content": "hi"}]}
        answer = await api.post("/v1/chat/completions", body)
        assert answer.json()["model"] == MODEL
