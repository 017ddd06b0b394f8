# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""One process a rank; every rank runs the same plans and rank 0 answers.

The ranks hold whole copies of the model: this proves the interface, not tensor parallelism. After
each step they compare what they drew.
"""

import os
import shutil
import sys
from datetime import timedelta

import msgspec
import torch
import torch.distributed as dist
import zmq

from llmserve.config.engine import EngineConfig
from llmserve.config.hf import ModelDescription
from llmserve.core.kv_spec import KVCacheConfig
from llmserve.core.scheduler_output import (
    ModelRunnerOutput,
    SchedulerOutput,
    decode_mask,
    decode_output,
    decode_plan,
    encode,
)
from llmserve.errors import ConfigError, EngineDeadError, EngineError
from llmserve.executor.base import Executor, ModelFacts
from llmserve.utils import logger
from llmserve.utils.child import Child, make_run_dir, receive_start
from llmserve.worker.worker import Worker

_POLL_MS = 200
_EXIT_SECONDS = 5.0


class RankConfig(msgspec.Struct):
    """What a rank is started with. `folder` holds the sockets and the rendezvous file."""

    rank: int
    num_ranks: int
    folder: str
    config: EngineConfig
    model: ModelDescription


class MultiProcExecutor(Executor):
    """`tensor_parallel_size` processes, over ZMQ sockets in a folder that only this user may open.

    A frame to a rank is (what, payload); one from a rank is (what, payload) with what = ok, output,
    config_error or error.
    """

    def __init__(self, config: EngineConfig, model: ModelDescription) -> None:
        super().__init__(config, model)
        self.num_ranks = config.device.tensor_parallel_size
        self._folder = make_run_dir()
        self._context = zmq.Context()
        self._answers = self._context.socket(zmq.PULL)
        self._answers.bind(f"ipc://{self._folder}/answers")
        self._ranks: list[zmq.Socket[bytes]] = []
        self._children: list[Child] = []
        for rank in range(self.num_ranks):
            plans = self._context.socket(zmq.PUSH)
            # Connected, not bound: what is sent is queued though the rank may never come.
            plans.connect(f"ipc://{self._folder}/rank{rank}")
            self._ranks.append(plans)
            start = RankConfig(rank, self.num_ranks, self._folder, config, model)
            self._children.append(Child("llmserve.executor.multiproc", start))

    def load(self) -> ModelFacts:
        """See Executor."""
        self._tell(b"load")
        facts = [msgspec.msgpack.decode(x, type=ModelFacts) for x in self._gather()]
        return min(facts, key=lambda fact: fact.kv_bytes_available)

    def initialize_kv_cache(self, kv_config: KVCacheConfig) -> None:
        """See Executor."""
        length = self.config.model.max_model_len
        self._tell(b"kv_cache", msgspec.msgpack.encode((kv_config, length)))
        self._gather()

    def forward(self, plan: SchedulerOutput) -> None:
        """See Executor."""
        self._tell(b"forward", encode(plan))

    def sample(self, plan: SchedulerOutput) -> "MultiProcHandle":
        """See Executor."""
        self._tell(b"sample", encode(plan.mask))
        return MultiProcHandle(self)

    def shutdown(self) -> None:
        """See Executor."""
        for child in self._children:
            child.terminate()
        for child in self._children:
            child.end(_EXIT_SECONDS)
        self._context.destroy(linger=0)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _tell(self, what: bytes, payload: bytes = b"") -> None:
        for rank in self._ranks:
            rank.send_multipart((what, payload))

    def _gather(self) -> list[bytes]:
        return [self.receive() for _ in range(self.num_ranks)]

    def receive(self) -> bytes:
        """The next answer's payload; raises what a rank raised, or EngineDeadError."""
        while not self._answers.poll(_POLL_MS):
            for rank, child in enumerate(self._children):
                if not child.alive() and not self._answers.poll(0):
                    code = child.process.returncode
                    raise EngineDeadError(f"rank {rank} ended with code {code}")
        what, payload = self._answers.recv_multipart()
        if what == b"config_error":
            raise ConfigError(payload.decode())
        if what == b"error":
            raise EngineError(payload.decode())
        return payload


class MultiProcHandle:
    """A step in flight; results come in the order of the steps."""

    def __init__(self, executor: MultiProcExecutor) -> None:
        self.executor = executor

    def result(self) -> ModelRunnerOutput:
        """Waits for rank 0's tokens."""
        return decode_output(self.executor.receive())


class Rank:
    """One rank's process: runs what comes, in order, until the executor ends it."""

    def __init__(self, rank_config: RankConfig) -> None:
        self.rank = rank_config.rank
        self.num_ranks = rank_config.num_ranks
        self.worker = Worker(rank_config.config, rank_config.model)
        self.plans: list[SchedulerOutput] = []
        context = zmq.Context()
        folder = rank_config.folder
        self._inbox = context.socket(zmq.PULL)
        self._inbox.bind(f"ipc://{folder}/rank{self.rank}")
        self._outbox = context.socket(zmq.PUSH)
        self._outbox.connect(f"ipc://{folder}/answers")
        if threads := rank_config.config.device.cpu_threads:
            torch.set_num_threads(threads)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=self.rank,
            world_size=self.num_ranks,
            timeout=timedelta(minutes=5),
        )

    def run(self) -> int:
        """The exit code, where it cannot go on."""
        while True:
            what, payload = self._inbox.recv_multipart()
            try:
                answer = self._do(what, payload)
            except ConfigError as error:
                self._outbox.send_multipart((b"config_error", error.message.encode()))
                return 2
            except Exception as error:  # boundary: the executor raises it in the engine
                self._outbox.send_multipart((b"error", f"rank {self.rank}: {error!r}".encode()))
                raise
            if answer is not None:
                self._outbox.send_multipart(answer)

    def _do(self, what: bytes, payload: bytes) -> tuple[bytes, bytes] | None:
        match what:
            case b"load":
                facts = ModelFacts(**self.worker.load())
                return b"ok", msgspec.msgpack.encode(facts)
            case b"kv_cache":
                kv_config, length = msgspec.msgpack.decode(payload, type=tuple[KVCacheConfig, int])
                self.worker.initialize_kv_cache(kv_config, length)
                return b"ok", b""
            case b"forward":
                plan = decode_plan(payload)
                self.plans.append(plan)
                self.worker.forward(plan)
            case b"sample":
                plan = self.plans.pop()
                plan.mask = decode_mask(payload)
                output = self.worker.sample(plan).result()
                self._compare(output)
                if self.rank == 0:
                    return b"output", encode(output)
            case _:
                raise AssertionError(what)
        return None

    def _compare(self, output: ModelRunnerOutput) -> None:
        drawn = torch.from_numpy(output.token_ids.astype("int64").ravel())
        extremes = torch.cat((drawn, -drawn))
        dist.all_reduce(extremes, dist.ReduceOp.MAX)
        highest, lowest = extremes[: len(drawn)], -extremes[len(drawn) :]
        assert torch.equal(highest, lowest), "the ranks drew different tokens"


def main(fd: int) -> int:
    """A rank's entry: its RankConfig comes over the inherited socket `fd`."""
    rank_config = receive_start(fd, RankConfig)
    logger.configure(f"Worker rank={rank_config.rank}")
    return Rank(rank_config).run()


if __name__ == "__main__":
    os._exit(main(int(sys.argv[1])))
