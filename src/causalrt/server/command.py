"""What `causalrt serve` does with its arguments. Nothing heavy is imported before it is needed."""

import argparse
import importlib
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from causalrt.errors import ExecutorError, Faults
from causalrt.install_hint import install_extra
from causalrt.server.settings import ServerSettings
from causalrt.terminal import printable_handler

if TYPE_CHECKING:
    from causalrt.engines.bundle import Bundle
    from causalrt.server.auth import Tokens

LIBRARIES = ("fastapi", "uvicorn", "websockets", "prometheus_client", "python_multipart", "av")
_DEFAULTS = {field.name: field.default for field in ServerSettings.__dataclass_fields__.values()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `causalrt serve`, those of the engine aside."""

    def add(flag: str, field: str, what: str, **how: Any) -> None:
        default = _DEFAULTS[field]
        shown = (
            "" if default in (None, False, ()) else f" ({default:g})" if isinstance(default, float) else f" ({default})"
        )
        if isinstance(default, tuple):
            how |= {"action": "append", "default": []}
        parser.add_argument(flag, dest=field, help=what + shown, **{"default": default, **how})

    add("--host", "host", "address to listen on; others than loopback want --tokens or --no-auth")
    add("--port", "port", "TCP port; 0 takes a free one", type=int)
    add("--tokens", "tokens", "file of bearer tokens, one a line, as TOKEN or NAME:TOKEN; mode 600", type=Path)
    add("--no-auth", "no_auth", "let everybody who reaches the server use it", action="store_true")
    add("--model-name", "model_name", "what clients call the model")
    add("--spool", "spool", "folder of jobs and videos, kept over restarts (one that goes with the server)", type=Path)
    add("--max-sessions", "max_sessions", "generations at once, fewer if memory holds fewer", type=int)
    add("--max-queue", "max_queue", "generations that may wait", type=int)
    add("--max-connections", "max_connections", "WebSockets at once", type=int)
    add(
        "--max-tcp-connections",
        "max_tcp_connections",
        "open connections of every kind, half of them for one address",
        type=int,
    )
    add("--max-prompt-chars", "max_prompt_chars", "characters of a prompt", type=int)
    add("--max-seconds", "max_seconds", "length of a job's video", type=float)
    add("--max-chunks", "max_chunks", "chunks of a generation (as the bundle allows)", type=int)
    add("--rate", "generations_per_minute", "jobs, starts and switches a minute of a token, or of an address", type=int)
    add("--max-spool-bytes", "max_spool_bytes", "bytes of kept videos from which on no job is taken", type=int)
    add("--keep", "job_ttl_s", "seconds that a finished job is kept", type=float)
    add("--stall", "stall_s", "seconds without progress after which a reader is given up", type=float)
    add("--max-pause", "pause_s", "seconds that a pause may last", type=float)
    add("--grace", "grace_s", "seconds that running generations have after SIGTERM", type=float)
    add("--allow-origin", "allowed_origins", "page of another origin that may use the server; may be given again")
    add("--allow-host", "allowed_hosts", "name that the server is called by; may be given again")
    add("--trust-proxy", "trusted_proxies", "proxy whose X-Forwarded headers are believed; may be given again")


def run(arguments: argparse.Namespace, *, version: str, on_start: Callable[[str], None]) -> int:
    """Load the bundle and serve it until a signal.

    Args:
        arguments: what `add_arguments` added, and the bundle, the text encoder, and how to load them; `about` and `examples`
            (`ServerSettings`) may be there, too.
        version: of the OpenAPI document.
        on_start: told the URL once requests are taken.

    Returns:
        0, the exit code of an orderly end.

    Raises:
        CausalRTError: a setting, a library, the bundle or the text encoder is not as it must be.
    """
    settings, tokens, bundle = checked(arguments)
    assert bundle is not None

    import asyncio

    from causalrt.engines.bundle import open_bundle
    from causalrt.runtime.engine import Engine
    from causalrt.runtime.load import load
    from causalrt.runtime.start import open_text_encoder
    from causalrt.server import run as running
    from causalrt.server.engine_host import BundleReplacedError

    handler = printable_handler(sys.stderr, "%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    listening = running.listen(settings.host, settings.port, send_buffer_bytes=settings.send_buffer_bytes)
    encoder = open_text_encoder(arguments.text_encoder, arguments.text_device, bundle.config)

    def check_same(found: "Bundle") -> None:
        if found != bundle:
            raise BundleReplacedError(
                f"{arguments.bundle} has been replaced by another bundle since the server was started; restart the server to "
                "serve that one, or put the former one back"
            )

    def load_engine() -> Engine:
        check_same(open_bundle(arguments.bundle, verify=False))  # before time is spent on loading it
        engine = load(
            arguments.bundle,
            executor=arguments.executor,
            device=arguments.device,
            cuda_graphs=arguments.cuda_graphs == "on",
            num_threads=arguments.threads,
            timeout_s=arguments.timeout,
            vae=True,
            max_sessions=settings.max_sessions,
        )
        try:
            check_same(engine.bundle)
        except BundleReplacedError:
            engine.close()
            raise
        return engine

    with listening, load_engine() as engine:
        asyncio.run(
            running.serve(
                engine,
                load_engine,
                encoder.encode,
                settings,
                tokens=tokens,
                listening=listening,
                version=version,
                tokenize=encoder.tokenize,
                on_start=lambda server: on_start(running.address(listening)),
            )
        )
    return 0


def checked(arguments: argparse.Namespace) -> "tuple[ServerSettings, Tokens, Bundle | None]":
    """Settings, tokens, and the bundle if the arguments name one; nothing is loaded or made yet.

    Raises:
        CausalRTError: a setting, a library, the tokens, the spool or the bundle is not as it must be; CombinedConfigError if
            several are not.
    """
    from causalrt.engines.bundle import open_bundle
    from causalrt.runtime.load import check_rank_limits

    given = {name: getattr(arguments, name) for name in _DEFAULTS if hasattr(arguments, name)}
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    settings, bundle, tokens, faults = None, None, None, Faults()
    with faults:
        settings = ServerSettings(**values)
    with faults:
        check_rank_limits(num_threads=arguments.threads, timeout_s=arguments.timeout)
    with faults:
        if arguments.bundle is not None:
            bundle = open_bundle(arguments.bundle, verify=False)
    with faults:
        _check_libraries()
        from causalrt.server.auth import Tokens
        from causalrt.server.job_store import check_spool

        with faults:
            if arguments.spool is not None:
                check_spool(arguments.spool)
        tokens = Tokens() if arguments.tokens is None else Tokens.from_file(arguments.tokens)
    faults.report()
    assert settings is not None
    assert tokens is not None
    return settings, tokens, bundle


def _check_libraries() -> None:
    for name in LIBRARIES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ExecutorError(
                f"the server needs {name}, which cannot be imported ({error}); {install_extra('serve')}"
            ) from None
