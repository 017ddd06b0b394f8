# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import select
from pathlib import Path

import zmq

from llmserve.core.messages import AbortRequests, EngineFailed, UtilityResult
from llmserve.engine.channel import (
    Codec,
    client_address,
    drain,
    engine_address,
    pull_socket,
    push_socket,
)
from llmserve.engine.client import EngineClient
from llmserve.utils.child import make_run_dir


def test_both_directions_and_the_descriptor() -> None:
    """The client may come before the engine, and sleeps on its descriptor."""
    run_dir = make_run_dir()
    client = EngineClient(run_dir, 3)
    client.send(AbortRequests(3, [1]))  # nobody listens yet: kept
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    inbox = pull_socket(context, engine_address(run_dir), 1 << 20)
    codec = Codec()
    assert inbox.poll(2000)
    assert [codec.decode_to_engine(data) for data in drain(inbox)] == [AbortRequests(3, [1])]

    assert client.receive() == []
    assert not client.wait(0.01)
    push = push_socket(context, client_address(run_dir, 3))
    sent = [EngineFailed("a", True), UtilityResult(1, [2, 3])]
    for message in sent:
        push.send(codec.encode(message))
    got = []
    while len(got) < 2:
        readable, _, _ = select.select([client.fileno()], [], [], 2)
        assert readable
        got += client.receive()
    assert got == sent
    client.close()
    context.destroy(linger=0)
    for path in Path(run_dir).iterdir():
        path.unlink()
    Path(run_dir).rmdir()
