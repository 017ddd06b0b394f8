# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The error tree. Users see these; everything else is a bug of ours and an `assert`.

LLMServeError
├── ConfigError              a flag, file or model that cannot be served: one line, exit 2
├── RequestError        400  the request is wrong: names the field, the value and the limit
│   ├── ContextLengthError 400
│   ├── GrammarError       400
│   └── NotFoundError      404
├── OverloadedError     503  starting, draining, queue full: try again
└── EngineError         500  our side failed
    ├── EngineDeadError    503  the engine process is gone
    ├── DeadlineError      504  the client's time ran out while the request ran
    └── NumericalError     500  the logits of this request were NaN
"""


class LLMServeError(Exception):
    """Base of all errors that may reach a user. `str(error)` is the whole message."""

    status: int = 500
    type: str = "server_error"
    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


class ConfigError(LLMServeError):
    """Found before the server is ready; printed as one line."""


class RequestError(LLMServeError):
    """The client can mend it. `param` is the field in OpenAI's path form (`messages[0].role`)."""

    status = 400
    type = "invalid_request_error"


class ContextLengthError(RequestError):
    """The prompt does not fit the model's context."""

    code = "context_length_exceeded"


class GrammarError(RequestError):
    """The grammar that a request asks for cannot be compiled, or leads nowhere."""


class NotFoundError(RequestError):
    """No such model, route or object."""

    status = 404


class OverloadedError(LLMServeError):
    """Nothing is wrong with the request; `retry_after` is in seconds."""

    status = 503
    type = "service_unavailable_error"
    code = "server_is_overloaded"

    def __init__(self, message: str, *, code: str | None = None, retry_after: int = 1) -> None:
        super().__init__(message, code=code)
        self.retry_after = retry_after


class EngineError(LLMServeError):
    """A failure on our side."""


class EngineDeadError(EngineError):
    """The engine process ended; requests in flight are lost."""

    status = 503
    type = "service_unavailable_error"
    code = "engine_restarted"


class DeadlineError(EngineError):
    """The request ran when its time was over; one that still waited is an OverloadedError."""

    status = 504
    code = "request_timeout"


class NumericalError(EngineError):
    """A row's logits were not finite; nothing of it was cached."""

    code = "numerical_error"
