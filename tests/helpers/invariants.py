# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What must hold of a server whatever is done to it: I1 to I8, as functions to complaints.

A complaint begins with its invariant's name; an empty list is a pass. None of them starts, asks or
waits for anything: they judge what tests/helpers/faults.py has gathered.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.helpers.server import processes_of

MAX_GAP = 1e-4  # of log-probability: nearer than this, two tokens may change places in a batch
MAX_RSS_GROWTH = 20 << 20  # bytes
MAX_PROBE_S = 0.3
MAX_LINES = 20  # of log per failed request
_PRIVATE = re.compile(
    r"Traceback|0x[0-9a-f]{5,}|File \"|/(?:home|usr|tmp|root|proc|work|var)/|\.py\b|site-packages"
)

_NUMBERED = re.compile(
    r"(llmserve-|/engine-|/heartbeat-|/client-)\w+"
)  # names that differ by the process
_STACK = re.compile(r"(Current thread|Thread) 0x|  File \"|  \.\.\.|$|Extension modules")


@dataclass
class Solo:
    """What a prompt's greedy continuation is when it runs alone. `gaps[i]` is by how much the
    i-th token's log-probability is above the next one's."""

    prompt: str
    token_ids: list[int]
    gaps: list[float]


@dataclass
class Ended:
    """One stream as its client saw it. `endings` are "done" and "error", in order."""

    index: int  # of its Solo
    token_ids: list[int] = field(default_factory=list)
    endings: list[str] = field(default_factory=list)
    status: int = 200
    cut: bool = False  # the connection ended without the body's end
    error: str = ""  # the body or event that told of a failure
    seconds: float = 0.0
    times: list[float] = field(default_factory=list)  # of each event that had tokens


@dataclass
class Probe:
    """One look at a health route."""

    path: str
    status: int  # 0 is no answer
    seconds: float


@dataclass
class Snapshot:
    """A server's processes as /proc shows them, by the module that each runs."""

    engine_pid: int
    processes: Counter[str]
    fds: Counter[str]
    threads: Counter[str]
    rss: Counter[str]  # bytes; not of forks, which share most of it with their parent
    shm: set[str]
    files: set[str]  # under the server's own folders


def snapshot(supervisor: int, folders: Iterable[Path] = ()) -> Snapshot:
    """Of `supervisor` and all that descend from it."""
    seen = Snapshot(0, Counter(), Counter(), Counter(), Counter(), set(), set())
    roles: dict[int, str] = {}
    for pid in processes_of(supervisor):
        proc = Path(f"/proc/{pid}")
        try:
            words = (proc / "cmdline").read_text().split("\0")
            role = words[words.index("-m") + 1] if "-m" in words else words[0]
            links = [_target(link) for link in (proc / "fd").iterdir()]
            status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
            maps = (proc / "maps").read_text()
        except OSError:  # it ended while we looked
            continue
        if "VmRSS" not in status:  # so did this one
            continue
        roles[pid] = role
        if role == "llmserve.engine.process":
            seen.engine_pid = pid
        seen.processes[role] += 1
        seen.fds[role] += len(links)
        seen.threads[role] += int(status["Threads"])
        if roles.get(int(status["PPid"])) != role:
            seen.rss[role] += int(status["VmRSS"].split()[0]) << 10
        names = {link for link in links if link.startswith("/dev/shm/")}
        names |= set(re.findall(r"/dev/shm/\S+", maps))
        seen.shm |= {name for name in names if Path(name).exists()}  # others end with their users
    seen.shm |= {str(path) for path in Path("/dev/shm").glob("*llmserve*")}
    for folder in folders:
        seen.files |= {_NUMBERED.sub(r"\1", str(path)) for path in folder.rglob("*")}
    return seen


def _target(link: Path) -> str:
    try:
        return str(link.readlink())
    except OSError:
        return ""


def check_canary(solo: Solo, token_ids: Sequence[int]) -> list[str]:
    """I1: a request gives the tokens that it gave before."""
    if list(token_ids) == solo.token_ids:
        return []
    return [f"I1: the canary gave {list(token_ids)}, not {solo.token_ids}"]


def check_blocks(metrics: dict[str, float]) -> list[str]:
    """I2: no block and no request is left."""
    wrong = []
    free, cached = metrics["llmserve:kv_blocks{free}"], metrics["llmserve:kv_blocks{cached}"]
    total = metrics["llmserve:kv_blocks"]
    if not total or free + cached != total:
        wrong.append(f"I2: {free:g} free and {cached:g} cached of {total:g} blocks")
    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting"):
        if metrics[name]:
            wrong.append(f"I2: {name} is {metrics[name]:g}")
    return wrong


def check_restarts(
    before: Snapshot, after: Snapshot, counted_before: float, counted_after: float, expected: int
) -> list[str]:
    """I3: the engine is the process that it was, unless the row has it restarted."""
    wrong = []
    if counted_after - counted_before != expected:
        wrong.append(f"I3: {counted_after - counted_before:g} restarts counted, not {expected}")
    if (before.engine_pid != after.engine_pid) is not bool(expected):
        wrong.append(f"I3: the engine was pid {before.engine_pid}, is {after.engine_pid}")
    return wrong


def check_streams(solos: Sequence[Solo], streams: Iterable[Ended], may_fail: bool) -> list[str]:
    """I4: a stream says what its prompt says alone, and ends once. With `may_fail` it may end
    early, by one error event or by a refusal."""
    wrong = []
    for stream in streams:
        solo = solos[stream.index]
        name = f"I4: stream {stream.index}"
        if stream.status != 200:
            if not may_fail or stream.status != 503:
                wrong.append(f"{name} was refused with {stream.status}: {stream.error[:200]}")
            continue
        allowed = [["done"], ["error"]] if may_fail else [["done"]]
        if stream.endings not in allowed or stream.cut:
            cut = ", and was cut" if stream.cut else ""
            wrong.append(f"{name} ended with {stream.endings}{cut}: {stream.error[:200]}")
        got, want = stream.token_ids, solo.token_ids
        at = next((i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), None)
        if at is not None:
            if solo.gaps[at] >= MAX_GAP:
                wrong.append(f"{name} token {at} is {got[at]}, not {want[at]}")
        elif len(got) > len(want) or (stream.endings == ["done"] and len(got) < len(want)):
            wrong.append(f"{name} has {len(got)} tokens, not {len(want)}")
    return wrong


def check_probes(
    probes: Sequence[Probe], scale: float = 1.0, excused: Iterable[str] = ()
) -> list[str]:
    """I5: probes do not fail (those at the paths `excused` may) and are answered at once."""
    wrong = []
    for probe in probes:
        if probe.status != 200 and (probe.path not in excused or probe.status != 503):
            wrong.append(f"I5: {probe.path} answered {probe.status or 'nothing'}")
    return list(dict.fromkeys(wrong))


def check_probe_times(probes: Sequence[Probe], scale: float = 1.0) -> list[str]:
    """I5's deadline, for a machine `scale` times slower than the one it was set on."""
    times = sorted(probe.seconds for probe in probes)
    if not times:
        return ["I5: nobody probed"]
    slowest = times[min(len(times) - 1, int(len(times) * 0.99))]
    limit = MAX_PROBE_S * scale
    return [f"I5: p99 of probes {slowest:.3f} s, over {limit:.3f}"] if slowest > limit else []


def check_leaks(before: Snapshot, after: Snapshot, max_growth: int = MAX_RSS_GROWTH) -> list[str]:
    """I6: descriptors, threads, processes, shared memory and files are what they were; a compiler
    of grammars comes with the first of them and goes with the engine."""
    wrong = []
    for what in ("processes", "fds", "threads"):
        was, now = getattr(before, what), getattr(after, what)
        more = {role: (was[role], now[role]) for role in now if now[role] > was[role]}
        if more:
            wrong.append(f"I6: more {what} than before: {more}")
    lost = before.processes - after.processes
    if before.engine_pid != after.engine_pid:
        del lost["llmserve.structured_output.compile_server"]
    if lost:
        wrong.append(f"I6: processes are gone: {dict(lost)}")
    for what in ("shm", "files"):
        if more_names := getattr(after, what) - getattr(before, what):
            wrong.append(f"I6: {what} left: {sorted(more_names)[:5]}")
    growth = sum(after.rss.values()) - sum(before.rss.values())
    if growth > max_growth:
        by_role = {role: (after.rss[role] - before.rss[role]) >> 20 for role in after.rss}
        wrong.append(f"I6: {growth >> 20} MiB more resident memory: {by_role}")
    return wrong


def check_error_body(status: int, body: str, foreign: Iterable[str] = ()) -> list[str]:
    """I7: an error has OpenAI's shape and tells nothing that is not the client's own."""
    name = f"I7: the body of a {status}"
    try:
        error = json.loads(body)["error"]
        shape = {"message": str, "type": str, "param": str | None, "code": str | None}
        for key, kind in shape.items():
            if not isinstance(error[key], kind):
                return [f"{name} has {key} {error[key]!r}"]
    except (ValueError, LookupError, TypeError):
        return [f"{name} is {body[:200]!r}"]
    wrong = []
    if found := _PRIVATE.search(body):
        wrong.append(f"{name} tells {found[0]!r}: {body[:200]!r}")
    wrong += [f"{name} has another's text" for text in foreign if text in body]
    return wrong


def check_log(lines: Sequence[str], num_failed: int, canaries: Iterable[str]) -> list[str]:
    """I8: a failure is told in few lines, and none of them has what a client said."""
    wrong = []
    lines = [line for line in lines if not _STACK.match(line)]  # asked for, and long
    own = [line for line in lines if ' HTTP/1.1" ' not in line]
    allowed = MAX_LINES * max(1, num_failed)
    if len(own) > allowed:
        tail = "\n".join(own[-5:])
        wrong.append(f"I8: {len(own)} lines for {num_failed} failures, the last\n{tail}")
    for canary in canaries:
        for line in lines:
            if canary in line:
                wrong.append(f"I8: a secret is in the log: {line[:200]!r}")
                break
    return wrong
