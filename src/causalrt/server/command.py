"""`causalrt serve`: check the request, load the bundle and serve it. Nothing heavy is imported before it is needed."""

import importlib
import logging
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from causalrt.errors import ExecutorError, Faults
from causalrt.install_hint import install_extra
from causalrt.server.arguments import ServeRequest
from causalrt.server.settings import ServerSettings
from causalrt.terminal import printable_handler

if TYPE_CHECKING:
    from causalrt.engines.bundle import Bundle
    from causalrt.server.auth import Tokens

LIBRARIES = ("fastapi", "uvicorn", "websockets", "prometheus_client", "python_multipart", "av")


def run(
    request: ServeRequest,
    *,
    version: str,
    on_start: Callable[[str], None],
    about: str = "",
    examples: tuple[str, ...] = (),
) -> None:
    """Load the bundle and serve it until a signal arrives.

    Args:
        request: what to serve; it names a bundle and a text encoder.
        version: version of the OpenAPI document.
        on_start: called with the URL once requests are accepted.
        about: what the page says about the model.
        examples: prompts that the page offers.

    Raises:
        CausalRTError: a setting, a library, the bundle or the text encoder cannot be used.
    """
    settings, tokens, bundle = checked(request, about=about, examples=examples)
    path, encoder_path = request.bundle, request.text_encoder
    assert path is not None
    assert encoder_path is not None
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
    encoder = open_text_encoder(encoder_path, request.text_device, bundle.config)

    def check_same(found: "Bundle") -> None:
        if found != bundle:
            raise BundleReplacedError(
                f"{request.bundle} has been replaced by another bundle since the server was started; restart the server to "
                "serve that one, or put the former one back"
            )

    def load_engine() -> Engine:
        check_same(open_bundle(path, verify=False))  # before time is spent on loading it
        engine = load(
            path,
            executor=request.executor,
            device=request.device,
            cuda_graphs=request.cuda_graphs == "on",
            num_threads=request.threads,
            timeout_s=request.timeout,
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


def checked(
    request: ServeRequest, *, about: str = "", examples: tuple[str, ...] = ()
) -> "tuple[ServerSettings, Tokens, Bundle | None]":
    """Return the settings, the tokens, and the bundle if the request names one; nothing is loaded or created yet.

    Raises:
        CausalRTError: a setting, a library, the tokens, the spool or the bundle cannot be used; CombinedConfigError if several
            cannot.
    """
    from causalrt.engines.bundle import open_bundle
    from causalrt.runtime.load import check_rank_limits

    settings, bundle, tokens, faults = None, None, None, Faults()
    with faults:
        settings = request.settings(about=about, examples=examples)
    with faults:
        check_rank_limits(num_threads=request.threads, timeout_s=request.timeout)
    with faults:
        if request.bundle is not None:
            bundle = open_bundle(request.bundle, verify=False)
    with faults:
        _check_libraries()
        from causalrt.server.auth import Tokens
        from causalrt.server.job_store import check_spool

        with faults:
            if request.spool is not None:
                check_spool(request.spool)
        tokens = Tokens() if request.tokens is None else Tokens.from_file(request.tokens)
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
