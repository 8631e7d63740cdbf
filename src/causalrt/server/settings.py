"""Settings of a server: addresses, access, limits, paths and times."""

import re
from dataclasses import dataclass, fields
from pathlib import Path

from causalrt.errors import ConfigError, Faults
from causalrt.server.hosts import is_loopback, normal_host, normal_origin


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerSettings:
    """Settings of a server, checked on construction.

    Attributes:
        host: address to listen on; one beyond loopback needs `tokens` or `no_auth`.
        port: TCP port; 0 takes a free one.
        tokens: file of bearer tokens (`auth.py`); None requires none.
        no_auth: everybody who can reach the server may use it, even from other machines.
        model_name: name of the model in jobs.
        spool: folder of jobs and their videos, kept over restarts; None uses a temporary folder.
        max_sessions: most generations at once; fewer if the engine's memory holds fewer. They alternate chunk by chunk.
        max_queue: most generations in the queue.
        max_connections: most WebSockets at once.
        max_tcp_connections: most open connections of every kind; one address may have half of them, a trusted proxy all.
            Fewer if the process may not open enough files (`connections.py`).
        max_body_bytes: most bytes in the body of a request.
        max_message_bytes: most bytes of a WebSocket message from a client.
        max_prompt_chars: most characters of a prompt.
        max_seconds: greatest length of a job's video.
        about: description of the model on the page.
        examples: prompts that the page offers.
        max_chunks: most chunks of a real-time generation, if the bundle sets no limit; None sets none.
        generations_per_minute: most jobs, starts and switches per minute and token, or per address if there are no tokens.
        max_jobs: most jobs in the spool.
        max_spool_bytes: total size of finished videos at which no further job is accepted.
        job_ttl_s: seconds after its end at which a job and its file are removed.
        max_queued_chunks: most chunks that are generated but not yet sent; a slower reader stops the generator.
        stall_s: seconds without progress after which a reader is disconnected.
        pause_s: longest pause in seconds.
        auth_s: seconds within which a WebSocket client must send its token.
        head_s: seconds within which the head of a request must arrive, since the connection opened or the last answer ended.
        body_s: seconds within which the body of a request must arrive.
        grace_s: seconds that running generations may continue when the server ends.
        reload_after_s: wait before the engine is reloaded after its ranks died; four times as long before each further attempt.
        reload_max_wait_s: longest wait between two attempts, which never stop.
        send_buffer_bytes: size of a connection's send buffer in the kernel, which bounds the data in flight to a slow reader.
        allowed_origins: pages of other origins that may use the server, as `https://example.org`; kept as browsers spell them.
        allowed_hosts: host names of the server besides those of loopback; checked on loopback, or if any are given.
        trusted_proxies: addresses of proxies whose `X-Forwarded-For` and `-Proto` headers are trusted.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    tokens: Path | None = None
    no_auth: bool = False
    model_name: str = "causalrt"
    spool: Path | None = None
    max_sessions: int = 4
    max_queue: int = 64
    max_connections: int = 100
    max_tcp_connections: int = 512
    max_body_bytes: int = 65536
    max_message_bytes: int = 65536
    max_prompt_chars: int = 2000
    max_seconds: float = 60.0
    max_chunks: int | None = None
    about: str = ""
    examples: tuple[str, ...] = ()
    generations_per_minute: int = 120
    max_jobs: int = 10_000
    max_spool_bytes: int = 10 * 2**30
    job_ttl_s: float = 86400.0
    max_queued_chunks: int = 2
    stall_s: float = 20.0
    pause_s: float = 600.0
    auth_s: float = 10.0
    head_s: float = 10.0
    body_s: float = 20.0
    grace_s: float = 30.0
    reload_after_s: float = 1.0
    reload_max_wait_s: float = 60.0
    send_buffer_bytes: int = 262_144
    allowed_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    trusted_proxies: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        faults = Faults()
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in ("port", "max_queue", "grace_s") else 1e-3
            with faults:
                if isinstance(value, int | float) and not isinstance(value, bool) and not least <= value <= 2**53:
                    raise ConfigError(f"{field.name} must be at least {'0' if least == 0 else '1'}, got {value}")
        with faults:
            if self.port > 65535:
                raise ConfigError(f"port must be 0 to 65535, got {self.port}")
        with faults:
            if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", self.model_name):
                raise ConfigError(
                    f"model_name must be 1 to 64 letters, digits, '.', '_' and '-', got {self.model_name!r}"
                )
        for name in self.allowed_hosts:
            with faults:
                _check_host(name)
        origins = []
        for origin in self.allowed_origins:
            with faults:
                origins.append(_checked_origin(origin))
        object.__setattr__(self, "allowed_origins", tuple(origins))
        with faults:
            _check_host(self.host)
            if self.tokens is None and not self.no_auth and not self.on_loopback:
                raise ConfigError(
                    f"{self.host} can be reached from other machines: give a file of tokens (--tokens FILE), listen on "
                    "127.0.0.1, or use --no-auth if access is restricted by other means"
                )
        faults.report()

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_loopback(normal_host(self.host))


def _check_host(host: str) -> None:
    try:
        normal_host(host)
    except ValueError:
        raise ConfigError(
            f"a host must be a name or an address, such as studio.example or 127.0.0.1, got {host!r}"
        ) from None


def _checked_origin(origin: str) -> str:
    try:
        return normal_origin(origin)
    except ValueError as error:
        raise ConfigError(f"an origin must be a scheme and a host, such as https://example.org; {error}") from None
