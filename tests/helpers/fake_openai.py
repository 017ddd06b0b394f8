# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""A scripted OpenAI server on loopback: answers every prompt with the same words at fixed times."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeOpenAI(ThreadingHTTPServer):
    """`words` are streamed, the first after `first_s` seconds, the others `next_s` apart. A prompt
    (or last message) of "fail" is answered with 500, "cut" loses its connection in mid-stream."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, words: list[str], first_s: float = 0.0, next_s: float = 0.0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.words, self.first_s, self.next_s = words, first_s, next_s
        self.requests: list[tuple[str, dict[str, Any], str | None]] = []
        self.running = self.most_running = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        """Its base address."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def bodies(self, path: str) -> list[dict[str, Any]]:
        """What was posted to `path`."""
        return [body for where, body, _ in self.requests if where == path]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeOpenAI

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        answers: dict[str, Any] = {"/v1/models": {"data": [{"id": "fake/model"}]}}
        self._json(200, answers.get(self.path, {}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, body, self.headers["Authorization"]))
        if self.path == "/tokenize":
            words = sorted(set(body["prompt"].split()))
            return self._json(200, {"tokens": [100 + i for i in range(len(words))]})
        if self.path == "/detokenize":
            return self._json(200, {"prompt": " ".join(f"t{id}" for id in body["tokens"])})
        prompt = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        if prompt == "fail":
            return self._json(500, {"error": {"message": "scripted failure"}})
        with self.server.lock:
            self.server.running += 1
            self.server.most_running = max(self.server.most_running, self.server.running)
        try:
            whole = self._stream("messages" in body, prompt)
        finally:
            with self.server.lock:  # before the end is sent: the client's next one follows at once
                self.server.running -= 1
        if whole:
            self._chunk(b"data: [DONE]\n\n")
            self._chunk(b"")

    def _json(self, status: int, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _stream(self, chat: bool, prompt: Any) -> bool:
        """All but the end; whether that is to follow."""
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self._chunk(b": keep-alive\n\n")
        if chat:
            self._event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        for number, word in enumerate(self.server.words):
            time.sleep(self.server.next_s if number else self.server.first_s)
            if prompt == "cut" and number == 1:
                self.close_connection = True
                return False
            self._event({"choices": [{"delta": {"content": word}} if chat else {"text": word}]})
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(self.server.words)}
        self._event({"choices": [], "usage": usage})
        return True

    def _event(self, value: object) -> None:
        self._chunk(b"data: " + json.dumps(value).encode() + b"\n\n")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()


@contextmanager
def fake_openai(
    words: list[str] | None = None, first_s: float = 0.0, next_s: float = 0.0
) -> Iterator[FakeOpenAI]:
    """Runs a FakeOpenAI in a thread."""
    server = FakeOpenAI(words or ["Hello", ",", " you"], first_s, next_s)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
