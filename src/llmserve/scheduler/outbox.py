# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What the scheduler has to tell each client, collected between two messages."""

from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from llmserve.core.messages import EngineOutputs, LogprobColumns, RequestExtra


class Outbox:
    """Columns of new tokens and the rare rest, per client."""

    def __init__(self) -> None:
        self._columns: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._extras: defaultdict[int, dict[int, RequestExtra]] = defaultdict(dict)

    def tokens(self, clients: np.ndarray, ids: np.ndarray, tokens: np.ndarray) -> None:
        """Row i: request `ids[i]` (uint32) of `clients[i]` got `tokens[i]` (int32)."""
        self._columns.append((clients, ids, tokens))

    def extra(self, client: int, wire_id: int) -> RequestExtra:
        """The rare rest of a request since the last `take`, to be filled in."""
        extras = self._extras[client]
        extra = extras.get(wire_id)
        if extra is None:
            extra = extras[wire_id] = RequestExtra()
        return extra

    def logprobs(self, news: Iterable[tuple[int, int, LogprobColumns]]) -> None:
        """Of the tokens that requests (client, wire id) just got."""
        by_client = self._extras
        for client, wire_id, columns in news:
            extras = by_client[client]
            if wire_id not in extras:
                extras[wire_id] = RequestExtra(logprobs=columns)
                continue
            extra = extras[wire_id]
            extra.logprobs = columns if extra.logprobs is None else _join(extra.logprobs, columns)

    def prompt_logprobs(self, client: int, wire_id: int, columns: LogprobColumns) -> None:
        """Of the prompt positions that follow those already told."""
        extra = self.extra(client, wire_id)
        before = extra.prompt_logprobs
        extra.prompt_logprobs = columns if before is None else _join(before, columns)

    def take(self) -> dict[int, EngineOutputs]:
        """News by client since the last call; clients without news are left out."""
        columns, extras = self._columns, self._extras
        if not columns and not extras:
            return {}
        self._columns, self._extras = [], defaultdict(dict)
        outputs = {client: EngineOutputs(extras=extra) for client, extra in extras.items()}
        if columns:
            clients, ids, tokens = (
                columns[0] if len(columns) == 1 else map(np.concatenate, zip(*columns, strict=True))
            )
            several = clients.tobytes() != clients[:1].tobytes() * len(clients)
            for client in np.unique(clients).tolist() if several else [clients.item(0)]:
                out = outputs.get(client)
                if out is None:
                    out = outputs[client] = EngineOutputs()
                if not several:
                    out.ids, out.tokens = ids.tobytes(), tokens.tobytes()
                    continue
                mine = clients == client
                out.ids, out.tokens = ids[mine].tobytes(), tokens[mine].tobytes()
        return outputs


def cut(columns: LogprobColumns, start: int, stop: int) -> LogprobColumns:
    """The positions [start, stop) of `columns`."""
    if start <= 0 and stop >= columns.n:
        return columns
    return LogprobColumns.pack(*(array[max(start, 0) : stop] for array in columns.unpack()))


def _join(a: LogprobColumns, b: LogprobColumns) -> LogprobColumns:
    assert a.width == b.width
    return LogprobColumns(
        a.n + b.n, a.width, a.token_ids + b.token_ids, a.logprobs + b.logprobs, a.ranks + b.ranks
    )
