"""What a server allows, and where it listens and writes."""

import re
from dataclasses import dataclass, fields
from pathlib import Path

from causalrt.errors import ConfigError, Faults
from causalrt.server.hosts import is_loopback, normal_host, normal_origin


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerSettings:
    """Limits, places and times of a server; checked when made.

    Attributes:
        host: address to listen on; beyond loopback it takes tokens, or `no_auth`.
        port: TCP port; 0 takes a free one.
        tokens: file of bearer tokens (`auth.py`); None asks for none.
        no_auth: whoever reaches the server may use it, even from other machines.
        model_name: what jobs call the model.
        spool: folder of jobs and their videos, kept over restarts; None makes one that goes with the server.
        max_sessions: generations at once; fewer if the engine's memory holds fewer. They take turns by chunk.
        max_queue: generations that may wait for their turn.
        max_connections: WebSockets at once.
        max_tcp_connections: open connections of every kind; one address may have half of them, a trusted proxy's all. Fewer
            where the process may not open enough files (`connections.py`).
        max_body_bytes: of a request.
        max_message_bytes: of a WebSocket message from a client.
        max_prompt_chars: of a prompt.
        max_seconds: of a job's video.
        about: what the page says of the model.
        examples: prompts that the page offers.
        max_chunks: of a real-time generation, where the bundle sets no end; None sets none.
        generations_per_minute: jobs, starts and switches of one token, or of one address where there are no tokens.
        max_jobs: jobs that the spool keeps.
        max_spool_bytes: bytes of finished videos from which on no job is taken.
        job_ttl_s: seconds after its end at which a job and its file are removed.
        max_queued_chunks: chunks made and not yet sent; a reader that is slower stops the generator.
        stall_s: seconds without progress after which a reader is given up.
        pause_s: seconds that a pause may last.
        auth_s: seconds that a WebSocket has for its token.
        head_s: seconds that a request has for its head, since the connection was made or the last answer was sent.
        body_s: seconds that a request has for its body.
        grace_s: seconds that running generations have when the server ends.
        reload_after_s: wait before the engine is loaded again after its ranks died; four times as long before each further try.
        reload_max_wait_s: longest wait between two tries, which never end.
        send_buffer_bytes: of a connection, in the kernel: so much may be under way to a reader that does not read.
        allowed_origins: pages of other origins that may use the server, as `https://example.org`; kept as browsers spell them.
        allowed_hosts: names that it is called by, beside loopback's own; checked on loopback, or if some are given.
        trusted_proxies: addresses whose `X-Forwarded-For` and `-Proto` are believed.
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
                    "127.0.0.1, or say --no-auth if something else keeps strangers out"
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
        raise ConfigError(f"a host is a name or an address, as studio.example or 127.0.0.1, got {host!r}") from None


def _checked_origin(origin: str) -> str:
    try:
        return normal_origin(origin)
    except ValueError as error:
        raise ConfigError(f"an origin is a scheme and a host, as https://example.org; {error}") from None
