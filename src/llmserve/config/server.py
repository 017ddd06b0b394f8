# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The HTTP server; nothing here changes what the engine computes."""

from dataclasses import dataclass
from typing import Any

from llmserve.config.flag import check_all, flag, not_negative, positive, up_to


def _port(value: int) -> str | None:
    return None if 0 <= value <= 65535 else "must be a port from 0 to 65535"


def _above_zero(value: float) -> str | None:
    return None if value > 0 else "must be above 0"


@dataclass(frozen=True)
class ServerConfig:
    """Address, keys and what the routes say."""

    host: str = flag("127.0.0.1", "Address to listen on; 0.0.0.0 is every interface.")
    port: int = flag(8000, "Port to listen on; 0 takes a free one.", check=_port)
    uds: str | None = flag(None, "Unix socket to listen on instead of host and port.")
    api_key: list[str] = flag(
        [], "Keys that clients must bring; also LLMSERVE_API_KEY.", repeat=True
    )
    allowed_hosts: list[str] = flag(
        [],
        "Host names that requests may carry besides localhost and IP addresses; * is any. Checked "
        "where --host is a loopback address, or where this is given.",
        repeat=True,
    )
    allowed_origins: list[str] = flag([], "Origins that browsers may call from.", repeat=True)
    root_path: str = flag("", "Path prefix that a proxy strips.")
    chat_template: str | None = flag(None, "Jinja file or text used instead of the model's.")
    default_chat_template_kwargs: dict[str, Any] = flag({}, "JSON given to every chat template.")
    trust_request_chat_template: bool = flag(
        False, "Clients may send a chat template of their own; it runs in this process."
    )
    tool_call_parser: str | None = flag(
        None, "Format of tool calls; none is none. Default: by chat template and model."
    )
    reasoning_parser: str | None = flag(
        None, "Format of reasoning; none is none. Default: by chat template and model."
    )
    reasoning_field: str = flag(
        "both",
        "Where answers carry reasoning.",
        choices=("both", "reasoning", "reasoning_content"),
    )
    response_role: str = flag("assistant", "Role of chat answers.")
    enable_force_include_usage: bool = flag(False, "Send usage in every stream.")
    stream_interval: int = flag(1, "Least tokens in one streamed chunk.", check=positive)
    sse_keep_alive_interval: float = flag(
        15.0, "Seconds between comments on a silent stream; 0 is none.", check=not_negative
    )
    max_request_bytes: int = flag(64 << 20, "Largest request body.", check=positive)
    read_timeout: float = flag(
        30.0,
        "Seconds that a client has to send its request, and 1 more for each 16 KiB of its body.",
        check=_above_zero,
    )
    write_timeout: float = flag(
        30.0, "Seconds after which a client that reads nothing is cut off.", check=_above_zero
    )
    request_timeout: float = flag(
        0.0,
        "Longest a request may take, in seconds; X-Request-Timeout-Ms may ask for less. 0 is no "
        "limit.",
        check=not_negative,
    )
    max_requests_per_key: int | None = flag(
        None,
        "Most requests of one API key at a time; 0 is no limit. Default: with several keys, half "
        "of what runs and waits in all.",
        check=not_negative,
    )
    prefix_cache_scope: str = flag(
        "auto",
        "Who shares cached prefixes: all, or each API key for itself (auto where there are "
        "several).",
        choices=("auto", "global", "key"),
    )
    api_server_count: int | None = flag(
        None,
        "API server processes, 1 to 16. Default: as many as the model's tokens may need, at most "
        "one for 4 cores; 1 without a GPU.",
        check=up_to(16),
    )
    admin_socket: str | None = flag(
        None, "Unix socket for POST /reset_prefix_cache, for its owner alone."
    )
    log_format: str = flag("text", "Log lines as text or as JSON.", choices=("text", "json"))
    enable_log_requests: bool = flag(False, "Log each request's id and lengths, never its text.")
    disable_log_stats: bool = flag(False, "No periodic line about throughput.")
    uvicorn_log_level: str = flag(
        "info",
        "Log level of the HTTP server.",
        choices=("debug", "info", "warning", "error", "critical", "trace"),
    )
    disable_uvicorn_access_log: bool = flag(False, "No line per HTTP request.")
    shutdown_timeout: float = flag(
        30.0, "Seconds that running requests get after SIGTERM.", check=not_negative
    )
    engine_start_timeout: float = flag(
        600.0, "Seconds from an engine's start until it must be ready.", check=_above_zero
    )
    api_hang_timeout: float = flag(
        20.0,
        "Seconds that an API server may be stuck before it is restarted.",
        check=_above_zero,
    )
    engine_hang_timeout: float = flag(
        60.0,
        "Seconds that a step may take beyond its tokens before the engine is restarted.",
        check=_above_zero,
    )

    def __post_init__(self) -> None:
        check_all(self)
