# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Fault points. The package has none: Python imports this module first in every process of a server
whose PYTHONPATH begins with this folder, and it changes what the faults are planted in.

Some fail for a request that carries their seed or word. Others fail once, at the Nth call after
`arm` has written N into the file of their name in the folder LLMSERVE_TEST_FAULTS; the file is then
renamed to NAME.hit. NAME ends with the process: engine, api, compiler or supervisor.
"""

import builtins
import contextlib
import errno
import importlib.abc
import importlib.machinery
import io
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

FOLDER = os.environ.get("LLMSERVE_TEST_FAULTS", "")
GRAMMAR, DETOKENIZER, PARSER, ADMISSION, NAN_PROMPT, NAN_LATER = range(9201, 9207)  # seeds
PRIVATE = "planted /root/secret.py 0x7fffdeadbeef"  # no client may see this
WORD = "planted"  # in a text, before the name of what is to fail
_ROLES = {
    "llmserve.engine.process": "engine",
    "llmserve.api.server": "api",
    "llmserve.structured_output.compile_server": "compiler",
    "llmserve.structured_output.preparer": "preparer",
}
_ROLE = next((_ROLES[word] for word in sys.orig_argv if word in _ROLES), "supervisor")
_raw_open, _lock = os.open, threading.Lock()


def arm(folder: str, name: str, n: int) -> None:
    """The `n`th call from now on fails."""
    path = os.path.join(folder, name)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{path}.hit")
    with open(f"{path}.new", "w") as file:
        file.write(str(n))
    os.replace(f"{path}.new", path)


def disarm(folder: str, name: str) -> bool:
    """Whether it had failed."""
    path = os.path.join(folder, name)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    return os.path.exists(f"{path}.hit")


def due(name: str) -> bool:
    """Whether this call is the one that fails."""
    path = os.path.join(FOLDER, f"{name}-{_ROLE}")
    with _lock:
        try:
            fd = _raw_open(path, os.O_RDWR)
        except OSError:
            return False
        left = int(os.read(fd, 16)) - 1
        if left:
            os.pwrite(fd, b"%-16d" % left, 0)
        os.close(fd)
        if not left:
            os.replace(path, f"{path}.hit")
    return not left


def failing(name: str, call: Callable[..., Any], error: Callable[[], Exception], own: bool) -> Any:
    """`call`, which fails when it is due; with `own` only calls out of the package count."""

    def instead(*args: Any, **kwargs: Any) -> Any:
        if (not own or _is_own(sys._getframe(1))) and due(name):
            raise error()
        return call(*args, **kwargs)

    return instead


def _is_own(frame: Any) -> bool:
    """Whether the package called, or a module of the standard library on its behalf."""
    for _ in range(4):
        if frame is None:
            return False
        if "/llmserve/" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


def before(owner: Any, name: str, check: Callable[..., None]) -> None:
    """`check` sees the arguments of each call, and may raise."""
    call = getattr(owner, name)

    def instead(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        return call(*args, **kwargs)

    setattr(owner, name, instead)


def fail() -> None:
    raise ZeroDivisionError(PRIVATE)


def patch_grammars(module: Any) -> None:
    def check(manager: Any, walk: Any, token: int) -> None:
        if walk.params.seed == GRAMMAR and walk.num_output == 2:
            fail()

    before(module.GrammarManager, "_accept", check)


def patch_detokenizer(module: Any) -> None:
    def remember(text: Any, tokenizer: Any, params: Any, *args: Any) -> None:
        text.planted = 3 if params.seed == DETOKENIZER else 0

    def check(text: Any, ids: list[int]) -> None:
        text.planted -= 1
        if text.planted == 0:
            fail()

    before(module.OutputText, "__init__", remember)
    before(module.OutputText, "feed", check)


def patch_parsed_text(module: Any) -> None:
    make = module.ParsedText.__init__

    def __init__(text: Any, tokenizer: Any, params: Any, *args: Any) -> None:
        make(text, tokenizer, params, *args)
        calls = [0]

        def check(piece: str) -> None:
            calls[0] += 1
            if calls[0] == 3:
                fail()

        if params.seed == PARSER:
            before(text._parser, "feed", check)

    module.ParsedText.__init__ = __init__


def patch_tokenizer(module: Any) -> None:
    def check(tokenizer: Any, text: Any, *args: Any) -> None:
        if f"{WORD} tokenizer" in text or any(f"{WORD} tokenizer" in part for part in text):
            fail()

    before(module.Tokenizer, "encode", check)
    before(module.Tokenizer, "encode_batch", check)


def patch_template(module: Any) -> None:
    def check(template: Any, messages: Any, *args: Any, **kwargs: Any) -> None:
        if f"{WORD} template" in str(messages):
            fail()

    before(module.ChatTemplate, "render", check)


def patch_admission(module: Any) -> None:
    def check(admission: Any, message: Any, *args: Any) -> None:
        if message.params.seed == ADMISSION:
            fail()

    before(module.Admission, "admit", check)


def patch_runner(module: Any) -> None:
    forward = module.ModelRunner.forward

    def instead(runner: Any, plan: Any) -> None:
        """NaN in all that the row of a marked request computes: hidden states and KV."""
        forward(runner, plan)
        started, index = runner._started, {NAN_PROMPT: 0, NAN_LATER: 20}
        inputs = started.inputs
        for row, slot, nth in zip(
            inputs.draw_rows, inputs.draw_slots, inputs.draw_index, strict=True
        ):
            if nth != index.get(int(runner.sampler._seeds[slot]), -1):
                continue
            tokens = slice(*inputs.token_starts[row : row + 2].tolist())
            with sys.modules["torch"].inference_mode():
                started.hidden[tokens] = float("nan")
                for cache, _, group in runner._layers:
                    metadata = inputs.metadata[group]
                    at = metadata.slot_mapping[tokens]
                    size = metadata.block_size
                    cache[at // size, :, :, at % size] = float("nan")

    module.ModelRunner.forward = instead


def patch_pool(module: Any) -> None:
    pool = module.BlockPool
    pool.allocate = failing("allocate", pool.allocate, lambda: MemoryError(PRIVATE), False)


def patch_linear(module: Any) -> None:
    """Of torch, and of the compiled CPU kernels."""
    error = RuntimeError(PRIVATE)
    module.linear = failing("linear", module.linear, lambda: error, False)


def patch_zmq(module: Any) -> None:
    error = module.ZMQError(errno.ENOBUFS)
    module.Socket.send = failing("send", module.Socket.send, lambda: error, False)


PATCHES: dict[str, Callable[[Any], None]] = {
    "llmserve.structured_output.manager": patch_grammars,
    "llmserve.frontend.detokenizer": patch_detokenizer,
    "llmserve.frontend.parsed_text": patch_parsed_text,
    "llmserve.frontend.tokenizer": patch_tokenizer,
    "llmserve.frontend.chat_template": patch_template,
    "llmserve.scheduler.admission": patch_admission,
    "llmserve.worker.model_runner": patch_runner,
    "llmserve.kv_cache.block_pool": patch_pool,
    "torch.nn.functional": patch_linear,
    "llmserve.kernels.cpu": patch_linear,
    "zmq.sugar.socket": patch_zmq,
}


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in PATCHES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None and spec.loader is not None
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            PATCHES[name](module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def plant() -> None:
    """In this process."""
    sys.meta_path.insert(0, _Finder())
    for owner in (builtins, io, os):
        none_left = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        owner.open = failing("open", owner.open, lambda e=none_left: e, True)  # type: ignore
    no_thread = RuntimeError("can't start new thread")
    threading.Thread.start = failing(  # type: ignore[method-assign]
        "thread", threading.Thread.start, lambda: no_thread, True
    )
    no_fork = BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    subprocess.Popen.__init__ = failing(  # type: ignore[method-assign]
        "fork", subprocess.Popen.__init__, lambda: no_fork, True
    )


if FOLDER:
    plant()
