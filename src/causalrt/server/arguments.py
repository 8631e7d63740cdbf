"""The request of `causalrt serve`, which is its command line; importing it is cheap, unlike importing the server."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Group, Parameter

from causalrt.options import (
    INPUT,
    OUTPUT,
    CudaGraphs,
    Device,
    Executor,
    Json,
    TextDevice,
    TextEncoder,
    Threads,
    Timeout,
)
from causalrt.server.settings import ServerSettings

ADDRESS = Group("Address and access", sort_key=4)
LIMITS = Group("Limits", sort_key=5)
TIMES = Group("Times, in seconds", sort_key=6)
_DEFAULT: dict[str, Any] = {entry.name: entry.default for entry in fields(ServerSettings)}


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True, slots=True)
class ServeRequest:
    """What to serve, to whom, and within what limits; `ServerSettings` has the same names.

    Attributes:
        bundle: Folder of the compiled bundle; by default the demo model, built for 2 ranks.
        config: TOML file of options by their names here, for example `max-queue = 8`; options of the command line override it.
        text_encoder: see `TextEncoder`.
        text_device: see `TextDevice`.
        executor: Executor that the ranks use; by default the best of those that the bundle was built for.
        device: see `Device`.
        cuda_graphs: see `CudaGraphs`.
        threads: see `Threads`.
        timeout: see `Timeout`.
        host: Address to listen on. Addresses other than loopback need --tokens or --no-auth.
        port: TCP port; 0 takes a free one.
        tokens: File of bearer tokens, one a line, as TOKEN or NAME:TOKEN; its mode must be 600.
        no_auth: Let everybody who reaches the server use it.
        model_name: Name of the model for clients.
        allowed_origins: Web page of another origin that may use the server; may be repeated.
        allowed_hosts: Name under which clients reach the server; may be repeated.
        trusted_proxies: Proxy whose X-Forwarded headers are believed; may be repeated.
        spool: Folder of jobs and videos that outlives a restart; by default a temporary one.
        max_sessions: Generations at once, or fewer if the memory holds fewer.
        max_queue: Generations that may wait.
        max_connections: WebSockets at once.
        max_tcp_connections: Open connections of every kind; one address may have half of them.
        max_prompt_chars: Characters of a prompt.
        max_seconds: Length of a job's video in seconds.
        max_chunks: Chunks of a generation; by default as many as the bundle allows.
        generations_per_minute: Jobs, starts and prompt switches a minute for one token, or for one address without tokens.
        max_spool_bytes: Bytes of stored videos above which no job is accepted.
        job_ttl_s: How long a finished job is kept.
        stall_s: How long a reader may make no progress before it is disconnected.
        pause_s: How long a pause may last.
        grace_s: How long running generations may continue after SIGTERM.
        json: see `Json`.
    """

    bundle: Annotated[Path | None, Parameter(group=INPUT)] = field(default=None, kw_only=False)
    text_encoder: TextEncoder | None = None
    config: Annotated[Path | None, Parameter(group=INPUT, metavar="FILE.toml")] = None
    text_device: TextDevice = "cpu"
    executor: Executor | None = None
    device: Device | None = None
    cuda_graphs: CudaGraphs = "on"
    threads: Threads | None = None
    timeout: Timeout | None = None
    host: Annotated[str, Parameter(group=ADDRESS)] = _DEFAULT["host"]
    port: Annotated[int, Parameter(group=ADDRESS)] = _DEFAULT["port"]
    tokens: Annotated[Path | None, Parameter(group=ADDRESS, metavar="FILE")] = None
    no_auth: Annotated[bool, Parameter(group=ADDRESS)] = False
    model_name: Annotated[str, Parameter(group=ADDRESS)] = _DEFAULT["model_name"]
    allowed_origins: Annotated[
        tuple[str, ...], Parameter(name="--allow-origin", group=ADDRESS, metavar="ORIGIN", consume_multiple=False)
    ] = ()
    allowed_hosts: Annotated[
        tuple[str, ...], Parameter(name="--allow-host", group=ADDRESS, metavar="NAME", consume_multiple=False)
    ] = ()
    trusted_proxies: Annotated[
        tuple[str, ...], Parameter(name="--trust-proxy", group=ADDRESS, metavar="ADDRESS", consume_multiple=False)
    ] = ()
    spool: Annotated[Path | None, Parameter(group=OUTPUT, metavar="FOLDER")] = None
    max_sessions: Annotated[int, Parameter(group=LIMITS)] = _DEFAULT["max_sessions"]
    max_queue: Annotated[int, Parameter(group=LIMITS)] = _DEFAULT["max_queue"]
    max_connections: Annotated[int, Parameter(group=LIMITS)] = _DEFAULT["max_connections"]
    max_tcp_connections: Annotated[int, Parameter(group=LIMITS)] = _DEFAULT["max_tcp_connections"]
    max_prompt_chars: Annotated[int, Parameter(group=LIMITS)] = _DEFAULT["max_prompt_chars"]
    max_seconds: Annotated[float, Parameter(group=LIMITS)] = _DEFAULT["max_seconds"]
    max_chunks: Annotated[int | None, Parameter(group=LIMITS)] = None
    generations_per_minute: Annotated[int, Parameter(name="--rate", group=LIMITS)] = _DEFAULT["generations_per_minute"]
    max_spool_bytes: Annotated[int, Parameter(group=LIMITS)] = _DEFAULT["max_spool_bytes"]
    job_ttl_s: Annotated[float, Parameter(name="--keep", group=TIMES)] = _DEFAULT["job_ttl_s"]
    stall_s: Annotated[float, Parameter(name="--stall", group=TIMES)] = _DEFAULT["stall_s"]
    pause_s: Annotated[float, Parameter(name="--max-pause", group=TIMES)] = _DEFAULT["pause_s"]
    grace_s: Annotated[float, Parameter(name="--grace", group=TIMES)] = _DEFAULT["grace_s"]
    json: Json = False

    def settings(self, *, about: str = "", examples: tuple[str, ...] = ()) -> ServerSettings:
        """The settings of the server, checked; `about` and `examples` are for its page.

        Raises:
            ConfigError: a setting cannot work; CombinedConfigError if several cannot.
        """
        chosen = {name: getattr(self, name) for name in _DEFAULT if hasattr(self, name)}
        return ServerSettings(**chosen, about=about, examples=examples)
