# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The bench holds on a healthy server, and each invariant catches a leak that is planted."""

import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import invariants as inv
from tests.helpers.clock import TooSlow
from tests.helpers.faults import Bench
from tests.helpers.invariants import Ended, Probe, Snapshot, Solo

SOLO = Solo("p", [1, 2, 3, 4], [0.5, 0.5, 1e-6, 0.5])
GOOD = {
    "llmserve:kv_blocks{free}": 200.0,
    "llmserve:kv_blocks{cached}": 56.0,
    "llmserve:kv_blocks": 256.0,
    "vllm:num_requests_running": 0.0,
    "vllm:num_requests_waiting": 0.0,
}


def test_all_hold_on_a_healthy_server(bench: Bench) -> None:
    with bench.load_and_invariants() as load:
        refused = bench.http.post("/v1/completions", json={"prompt": "x", "max_tokens": -1})
        assert refused.status_code == 400
    assert load is not None and len(load.streams) >= 4 and len(load.probes) >= 4
    assert len({tuple(solo.token_ids) for solo in bench.solos}) == 4
    assert all(len(set(solo.token_ids)) > 4 for solo in bench.solos)


def test_a_secret_in_the_log_of_a_real_server_is_caught(bench: Bench) -> None:
    with pytest.raises(AssertionError, match="I8: a secret"), bench.load_and_invariants(load=False):
        bench.server.output.append(f"(EngineCore) got {bench.canary}")
    bench.server.output.pop()


def test_a_stuck_request_of_a_real_server_is_caught(bench: Bench) -> None:
    body = {"prompt": "go on", "max_tokens": 2000, "ignore_eos": True, "stream": True}
    with bench.client() as http, http.stream("POST", "/v1/completions", json=body):
        wrong = inv.check_blocks(bench.server.metrics())
        assert any("blocks" in line for line in wrong) and any("running" in line for line in wrong)
    bench.check_idle()


def test_canary() -> None:
    assert not inv.check_canary(SOLO, [1, 2, 3, 4])
    assert inv.check_canary(SOLO, [1, 2, 3, 5])
    assert inv.check_canary(SOLO, [1, 2, 3])


@pytest.mark.parametrize(
    "planted",
    [
        {"llmserve:kv_blocks{free}": 199.0},
        {"llmserve:kv_blocks{free}": 201.0},
        {"vllm:num_requests_running": 1.0},
        {"vllm:num_requests_waiting": 1.0},
        {"llmserve:kv_blocks": 0.0, "llmserve:kv_blocks{free}": 0.0},
    ],
)
def test_lost_blocks_and_requests(planted: dict[str, float]) -> None:
    assert not inv.check_blocks(GOOD)
    assert inv.check_blocks(GOOD | planted)


def _snapshot(**changed: Any) -> Snapshot:
    base = Snapshot(
        7, Counter(a=1), Counter(a=10), Counter(a=3), Counter(a=50 << 20), {"/dev/shm/x"}, {"f"}
    )
    return replace(base, **changed)


def test_restarts() -> None:
    was, now = _snapshot(), _snapshot(engine_pid=8)
    assert not inv.check_restarts(was, was, 1, 1, 0)
    assert not inv.check_restarts(was, now, 1, 2, 1)
    assert inv.check_restarts(was, now, 1, 1, 0)
    assert inv.check_restarts(was, was, 1, 2, 0)
    assert inv.check_restarts(was, was, 1, 2, 1)
    assert inv.check_restarts(was, now, 1, 3, 1)


GOOD_STREAM = Ended(0, [1, 2, 3, 4], ["done"])


@pytest.mark.parametrize(
    ("planted", "may_fail"),
    [
        (Ended(0, [1, 9, 3, 4], ["done"]), False),
        (Ended(0, [1, 2, 3], ["done"]), True),
        (Ended(0, [1, 2, 3, 4, 5], ["done"]), False),
        (Ended(0, [1, 2, 3, 4], ["done", "done"]), False),
        (Ended(0, [1, 2], ["error", "done"]), True),
        (Ended(0, [1, 2], ["error"]), False),
        (Ended(0, [1, 2], []), True),
        (Ended(0, [1, 2, 3, 4], ["done"], cut=True), True),
        (Ended(0, [9], ["error"]), True),
        (Ended(0, status=503), False),
        (Ended(0, status=500), True),
    ],
)
def test_stream_of_other_tokens_or_endings(planted: Ended, may_fail: bool) -> None:
    assert inv.check_streams([SOLO], [GOOD_STREAM, planted], may_fail)


def test_stream_that_may_differ() -> None:
    assert not inv.check_streams([SOLO], [GOOD_STREAM], False)
    near = Ended(0, [1, 2, 9, 9], ["done"])  # at a gap under 1e-4
    assert not inv.check_streams([SOLO], [near], False)
    failed = [Ended(0, [1, 2], ["error"]), Ended(0, status=503)]
    assert not inv.check_streams([SOLO], failed, True)


def test_probes() -> None:
    good = [Probe("/health/live", 200, 0.01)] * 99
    assert not inv.check_probes(good) and not inv.check_probe_times(good)
    assert inv.check_probes([*good, Probe("/health/live", 503, 0.01)])
    assert inv.check_probes([*good, Probe("/health/ready", 0, 0.01)], excused=["/health/ready"])
    assert not inv.check_probes(
        [*good, Probe("/health/ready", 503, 0.01)], excused=["/health/ready"]
    )
    assert inv.check_probe_times([*good, Probe("/health/live", 200, 0.4)])
    assert not inv.check_probe_times([*good, Probe("/health/live", 200, 0.4)], scale=2.0)
    assert inv.check_probe_times([])


def test_a_missed_deadline_is_an_error_of_its_own(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inv, "MAX_PROBE_S", 0.0)
    with pytest.raises(TooSlow, match="I5"), bench.load_and_invariants():
        pass


LEAKY = """
    import mmap, os, subprocess, sys, threading, time
    kept = []
    print("ready", flush=True)
    for line in sys.stdin:
        what = line.strip()
        if what == "fds":
            kept.append(open("/dev/null"))
        elif what == "threads":
            threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        elif what == "processes":
            kept.append(subprocess.Popen(["sleep", "60"], stdin=subprocess.DEVNULL))
        elif what == "shm":
            kept.append(open(f"/dev/shm/test-{os.getpid()}", "w"))
        elif what == "files":
            open(sys.argv[1] + "/left", "w").close()
        elif what == "memory":
            kept.append(b"x" * (30 << 20))
        elif what == "end":
            os.unlink(f"/dev/shm/test-{os.getpid()}")
            for child in kept:
                if isinstance(child, subprocess.Popen):
                    child.kill()
                    child.wait()
            break
        print("done", flush=True)
"""


@pytest.fixture(scope="module")
def leaky(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    folder = tmp_path_factory.mktemp("leaky")
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(LEAKY), str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        process.stdout.readline()
        yield process, folder
        process.stdin.write("end\n")


@pytest.mark.parametrize("what", ["fds", "threads", "processes", "shm", "files", "memory"])
def test_leak_of_a_real_process(leaky: tuple[subprocess.Popen[str], Path], what: str) -> None:
    process, folder = leaky
    assert process.stdout is not None and process.stdin is not None
    before = inv.snapshot(process.pid, [folder])
    assert not inv.check_leaks(before, inv.snapshot(process.pid, [folder]))
    process.stdin.write(f"{what}\n")
    process.stdin.flush()
    process.stdout.readline()
    wrong = inv.check_leaks(before, inv.snapshot(process.pid, [folder]))
    assert any(what in line for line in wrong), wrong


def test_lost_process() -> None:
    assert inv.check_leaks(_snapshot(), _snapshot(processes=Counter()))
    assert not inv.check_leaks(_snapshot(), _snapshot(fds=Counter(a=9)))


@pytest.mark.parametrize(
    "body",
    [
        "Internal Server Error",
        '{"detail": "x"}',
        '{"error": "x"}',
        '{"error": {"message": "x", "type": "t", "param": null}}',
        '{"error": {"message": 1, "type": "t", "param": null, "code": null}}',
        '{"error": {"message": "see /usr/lib/x", "type": "t", "param": null, "code": null}}',
        '{"error": {"message": "at 0x7f00dead", "type": "t", "param": null, "code": null}}',
        '{"error": {"message": "Traceback", "type": "t", "param": null, "code": null}}',
        '{"error": {"message": "secret", "type": "t", "param": null, "code": null}}',
    ],
)
def test_error_body_of_another_shape_or_with_another_text(body: str) -> None:
    good = '{"error": {"message": "x", "type": "t", "param": null, "code": "c"}}'
    assert not inv.check_error_body(400, good, ["secret"])
    assert inv.check_error_body(400, body, ["secret"])


def test_log() -> None:
    quiet = ["a line"] * 20
    access = ['INFO "POST /v1/completions HTTP/1.1" 400'] * 100
    assert not inv.check_log(quiet + access, 1, ["secret"])
    assert inv.check_log([*quiet, "one more"], 1, [])
    assert not inv.check_log([*quiet, "one more"], 2, [])
    assert inv.check_log(["the secret"], 0, ["secret"])
    assert inv.check_log(['INFO "GET /secret HTTP/1.1" 404'], 0, ["secret"])
