# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""A seeded world around the real scheduler: clients, a fake worker, late results, restarts."""

import random
from collections import Counter, deque
from dataclasses import dataclass, field

import numpy as np

from llmserve.config.cache import CacheConfig
from llmserve.config.scheduler import SchedulerConfig
from llmserve.core.kv_spec import AnyKVSpec, KVCacheConfig, RecurrentStateSpec
from llmserve.core.messages import EngineOutputs, EngineRequest
from llmserve.core.sampling_params import SamplingParams
from llmserve.core.scheduler_output import ModelRunnerOutput, SchedulerOutput
from llmserve.kv_cache.groups import blocks_at_peak, make_kv_cache_config, plan_groups
from llmserve.scheduler.cost import StepCosts
from llmserve.scheduler.scheduler import Scheduler
from tests.helpers.fake_worker import (
    EOS,
    FULL,
    STATE_BYTES,
    VOCABULARY,
    FakeWorker,
    Solo,
    window,
)

MODELS: dict[str, list[AnyKVSpec]] = {
    "full": [FULL],
    "window": [FULL, window(6), window(11)],
    "only window": [window(9)],
    "recurrent": [FULL, RecurrentStateSpec(STATE_BYTES), window(5)],
    # two layers of different page size: blocks of 8 and 4 tokens
    "pages": [FULL, FULL.__class__(2, 8, 2), window(7)],
}


@dataclass
class World:
    """What one episode looks like; drawn by `World.draw` or given by a test."""

    model: str = "full"
    room: float = 2.0  # blocks of the pool in units of the largest request
    block_size: int = 4
    depth: int = 2
    num_drafts: int = 0
    max_model_len: int = 64
    nan_rate: float = 0.0
    restarts: bool = False
    add_rate: float = 0.5
    abort_rate: float = 0.03
    num_contents: int = 2
    scheduler: dict[str, object] = field(default_factory=dict)
    caching: bool = True
    costs: bool = False

    @classmethod
    def draw(cls, rng: random.Random) -> "World":
        """A random world."""
        depth = rng.choice((1, 2, 2, 3))
        model = rng.choice(list(MODELS))
        scheduler: dict[str, object] = {
            "max_num_seqs": rng.choice((1, 2, 5, 12)),
            "max_num_batched_tokens": rng.choice((4, 11, 32, 200)),
            "scheduling_policy": rng.choice(("fcfs", "priority")),
            "long_prefill_token_threshold": rng.choice((0, 0, 7)),
            "enable_chunked_prefill": rng.random() < 0.8,
            "max_num_queued_reqs": rng.choice((0, 0, 0, 25)),
        }
        if not scheduler["enable_chunked_prefill"]:
            scheduler["max_num_batched_tokens"] = rng.choice((40, 64, 200))
        drafts = depth == 1 and model != "recurrent" and rng.random() < 0.6
        return cls(
            model=model,
            room=rng.choice((1.0, 1.1, 1.4, 2.0, 8.0)),
            depth=depth,
            num_drafts=rng.choice((1, 3)) if drafts else 0,
            nan_rate=rng.choice((0.0, 0.002)),
            restarts=rng.random() < 0.3,
            add_rate=rng.choice((0.1, 0.3, 0.6)),
            scheduler=scheduler,
            caching=rng.random() < 0.85,
            costs=rng.random() < 0.5,
        )


@dataclass
class Sent:
    """A request as its client remembers it."""

    message: EngineRequest
    expected: list[int] | None  # None: not worked out yet
    tokens: list[int] = field(default_factory=list)
    scored: list[int] = field(default_factory=list)
    logprob_tokens: list[int] = field(default_factory=list)
    finish: str | None = None
    lost: bool = False
    told_start: int = 0


class Episode:
    """One world from its start until nothing is left to do."""

    def __init__(self, world: World, seed: int) -> None:
        self.world = world
        self.rng = random.Random(seed)
        self.seconds = random.Random(7)  # of steps, which take anything up to 10 s
        self.counts: Counter[str] = Counter()
        self.sent: dict[tuple[int, int], Sent] = {}
        self.open: list[tuple[int, int]] = []
        self.next_id = [0, 0]
        self.kv = self._kv_config()
        self.templates = [
            [self.rng.randrange(1, VOCABULARY) for _ in range(world.max_model_len)]
            for _ in range(3)
        ]
        self.start_engine()

    def _kv_config(self) -> KVCacheConfig:
        specs, size = MODELS[self.world.model], self.world.block_size
        tokens = int(self.world.scheduler.get("max_num_batched_tokens", 32))  # type: ignore[call-overload]
        largest = sum(
            blocks_at_peak(g, self.world.max_model_len, tokens) for g in plan_groups(specs, size)
        )
        return make_kv_cache_config(
            specs, size, 2**30, 1 + int(largest * self.world.room),
            max_model_len=self.world.max_model_len, max_num_batched_tokens=tokens,
        )  # fmt: skip

    def start_engine(self) -> None:
        """A fresh scheduler and worker; whatever the old ones had is gone."""
        world = self.world
        config: dict[str, object] = {"max_num_seqs": 5, "max_num_batched_tokens": 32}
        config |= {"enable_chunked_prefill": True} | world.scheduler
        self.scheduler = Scheduler(
            SchedulerConfig(**config),  # type: ignore[arg-type]
            CacheConfig(enable_prefix_caching=world.caching),
            self.kv,
            max_model_len=world.max_model_len,
            logits_width=VOCABULARY,
            eos_token_ids=[EOS],
            seed=5,
            max_in_flight=world.depth,
            num_draft_tokens=world.num_drafts,
            costs=StepCosts(None, 0.1, 3)
            if world.costs and config["enable_chunked_prefill"]
            else None,
        )
        self.worker = FakeWorker(
            self.kv, world.max_model_len, self.rng, world.num_drafts, world.nan_rate
        )
        self.in_flight: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()

    # -- clients

    def add(self, **changes: object) -> tuple[int, int]:
        """A random request; `changes` are fields of SamplingParams."""
        rng, room = self.rng, self.world.max_model_len
        length = rng.randrange(1, room)
        template = rng.choice(self.templates)
        shared = rng.choice((length, rng.randrange(0, length + 1)))
        prompt = template[:shared]
        prompt += [rng.randrange(1, VOCABULARY) for _ in range(length - shared)]
        content = rng.randrange(self.world.num_contents)
        params: dict[str, object] = {
            "max_tokens": rng.choice((None, 1, 3, 10, 25, 40)),
            "seed": rng.choice((3, 4)),
            "ignore_eos": rng.random() < 0.6,
            "extra_args": {"content": content},
        }
        if rng.random() < 0.3:
            params["stop_token_ids"] = rng.sample(range(VOCABULARY), 4)
            params["min_tokens"] = rng.randrange((params["max_tokens"] or 10) + 1)  # type: ignore[operator]
        if rng.random() < 0.2:
            params["logprobs"] = 0
        if rng.random() < 0.1:
            params["prompt_logprobs"] = 0
            params["max_tokens"] = rng.choice((0, 2))
            params["min_tokens"] = 0
        client = rng.randrange(2)
        return self.send(
            client, prompt, SamplingParams(**(params | changes)), content, rng.randrange(3)
        )

    def send(
        self, client: int, prompt: list[int], params: SamplingParams, content: int, priority: int
    ) -> tuple[int, int]:
        """One request to the engine."""
        self.next_id[client] += 1
        key = client, self.next_id[client]
        message = EngineRequest(
            client=client, request_id=key[1], prompt=np.array(prompt, np.int32).tobytes(),
            params=params, arrival=0.0, priority=priority, cache_salt=str(content),
        )  # fmt: skip
        self.sent[key] = Sent(message, None)
        self.open.append(key)
        self.counts["requests"] += 1
        self.scheduler.add(message)
        return key

    def solo(self, sent: Sent) -> tuple[list[int], tuple[str, int | None]]:
        """Tokens and end of a request that has the model for itself."""
        message, params = sent.message, sent.message.params
        prompt = message.prompt_token_ids.tolist()
        room = self.world.max_model_len - len(prompt)
        most = room if params.max_tokens is None else min(params.max_tokens, room)
        specs = [group.spec for group in self.kv.groups]
        model = Solo(specs, int(params.extra_args["content"]), params.seed or 0)
        model.feed(prompt)
        tokens: list[int] = []
        while len(tokens) < most:
            token = model.draw()
            tokens.append(token)
            if len(tokens) >= params.min_tokens:
                if token == EOS and not params.ignore_eos:
                    return tokens, ("stop", None)
                if token in params.stop_token_ids:
                    return tokens, ("stop", token)
            model.feed([token])
        return tokens, ("length", None)

    def deliver(self, outputs: dict[int, EngineOutputs]) -> None:
        """What the clients make of the news."""
        for client, out in outputs.items():
            ids = np.frombuffer(out.ids, np.uint32).tolist()
            tokens = np.frombuffer(out.tokens, np.int32).tolist()
            for wire_id, token in zip(ids, tokens, strict=True):
                sent = self.sent[client, wire_id]
                assert sent.finish is None and not sent.lost, "a token after the end"
                sent.tokens.append(token)
                self.counts["tokens"] += 1
            for wire_id, extra in out.extras.items():
                sent = self.sent[client, wire_id]
                assert sent.finish is None and not sent.lost, "news after the end"
                for columns, to in (
                    (extra.logprobs, sent.logprob_tokens), (extra.prompt_logprobs, sent.scored),
                ):  # fmt: skip
                    if columns is not None:
                        to += columns.unpack()[0][:, 0].tolist()
                sent.told_start += extra.num_cached_tokens is not None
                if extra.finish_reason is not None:
                    self.finish(sent, extra.finish_reason, extra.stop_reason)
                    self.counts[f"error {extra.error}"] += extra.error is not None
                    self.counts["max preemptions"] = max(
                        extra.num_preemptions, self.counts["max preemptions"]
                    )

    def finish(self, sent: Sent, reason: str, stop_reason: int | None) -> None:
        """Compares a finished request with itself alone."""
        sent.finish = reason
        self.open.remove((sent.message.client, sent.message.request_id))
        self.counts[reason] += 1
        expected, end = self.solo(sent)
        params = sent.message.params
        if reason in ("stop", "length"):
            assert sent.tokens == expected, (sent.tokens, expected)
            assert (reason, stop_reason) == end
            assert sent.told_start == bool(expected or sent.scored)
            if params.logprobs is not None:
                assert sent.logprob_tokens == expected
            if params.prompt_logprobs is not None:
                assert sent.scored == sent.message.prompt_token_ids.tolist()[1:]
        else:
            assert sent.tokens == expected[: len(sent.tokens)]
            assert len(sent.tokens) <= len(expected)

    # -- engine

    def step(self, patient: bool = False) -> None:
        """Schedules if it can, commits if it must or likes to."""
        plan = self.scheduler.schedule()
        if plan is not None:
            self.counts["steps"] += 1
            self.counts["rows"] += plan.num_rows
            assert plan.num_tokens <= self.scheduler.max_tokens
            output = self.worker.execute(plan)
            output.seconds = 10 * self.seconds.random()
            self.in_flight.append((plan, output))
        full = len(self.in_flight) >= self.world.depth
        if self.in_flight and (plan is None or full or (not patient and self.rng.random() < 0.3)):
            self.scheduler.commit(*self.in_flight.popleft())
        elif plan is None:
            assert not self.scheduler.has_unfinished(), "requests wait and nothing moves"
        self.deliver(self.scheduler.take_outputs())

    def tick(self) -> None:
        """One round of everything that can happen."""
        rng, world = self.rng, self.world
        if rng.random() < world.add_rate and len(self.open) < 40:
            for _ in range(rng.choice((1, 1, 2, 6))):
                self.add()
        if self.open and rng.random() < world.abort_rate:
            self.scheduler.abort(*rng.choice(self.open))
            self.counts["aborts"] += 1
        if rng.random() < 0.01:
            self.scheduler.abort(rng.randrange(2), 2**31)
        if rng.random() < 0.01 and self.scheduler.reset_prefix_cache():
            self.counts["resets"] += 1
        if world.restarts and rng.random() < 0.003:
            self.take_counters()
            for key in self.open:
                self.sent[key].lost = True
            self.open.clear()
            self.start_engine()
            self.counts["restarts"] += 1
        self.step()
        if rng.random() < 0.05:
            self.scheduler.check_integrity()

    def take_counters(self) -> None:
        """Adds up what the scheduler counted."""
        stats = self.scheduler.stats()
        for name in (
            "num_preemptions", "prefix_hits", "num_chunked_prefills", "num_wasted_tokens",
            "num_late_results", "num_dropped_events", "num_tokens_computed",
        ):  # fmt: skip
            self.counts[name] += getattr(stats, name)
        self.counts["nan"] += self.worker.num_nan
        self.counts["accepted drafts"] += self.worker.num_accepted
        self.counts["max_in_flight"] = max(self.counts["max_in_flight"], stats.max_in_flight)

    def run(self, num_ticks: int) -> Counter[str]:
        """`num_ticks` rounds, then until all is done; returns what happened."""
        for _ in range(num_ticks):
            self.tick()
        self.drain()
        return self.counts

    def drain(self) -> None:
        """Lets everything finish; afterwards nothing may be left of it."""
        while self.scheduler.has_unfinished():
            self.step()
        self.deliver(self.scheduler.take_outputs())
        assert not self.open, "a request never got its end"
        assert all((sent.finish is None) == sent.lost for sent in self.sent.values())
        self.scheduler.check_integrity()
        pool = self.scheduler.kv.pool
        assert pool.num_available == pool.num_blocks - 1
        self.take_counters()


def num_events(counts: Counter[str]) -> int:
    """Requests, aborts, steps, rows and tokens: each can go wrong on its own."""
    return sum(counts[name] for name in ("requests", "aborts", "steps", "rows", "tokens"))


def simulate(events: int, seed: int, ticks: int = 400, only: World | None = None) -> Counter[str]:
    """Random worlds until `events` have happened; an error says which world it was."""
    total: Counter[str] = Counter()
    while num_events(total) < events:
        world = only or World.draw(random.Random(seed))
        try:
            counts = Episode(world, seed).run(ticks)
        except Exception as error:
            error.add_note(f"seed {seed}: {world}")
            raise
        deepest = max(counts["max_in_flight"], total["max_in_flight"])
        preempted = max(counts["max preemptions"], total["max preemptions"])
        total.update(counts)
        total["max_in_flight"], total["max preemptions"] = deepest, preempted
        seed += 1
        total["episodes"] += 1
    return total
