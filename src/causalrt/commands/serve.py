"""`causalrt serve`: serve a bundle over HTTP and WebSockets."""

import contextlib
import json
from dataclasses import replace
from typing import Any

from cyclopts import App, ArgumentCollection
from cyclopts.config import Dict

from causalrt import __version__
from causalrt.commands.output import say
from causalrt.errors import ConfigError, Faults
from causalrt.server.arguments import ServeRequest
from causalrt.tools.arguments import ABOUT, ROWS
from causalrt.tools.arguments import EXAMPLES as PROMPTS
from causalrt.tools.progress_bars import shown_progress

EXAMPLES = """
causalrt serve
causalrt serve bundle --text-encoder Wan2.1-T2V-1.3B
causalrt serve bundle --text-encoder Wan2.1-T2V-1.3B --host 0.0.0.0 \\
    --tokens tokens.txt --spool /var/lib/causalrt
causalrt serve --config serve.toml
"""


def read_options(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Fill options that the command line leaves out from the TOML file of `--config`.

    Raises:
        ConfigError: the file cannot be read, or is not TOML.
    """
    tokens = arguments["--config"].tokens
    if not tokens:
        return
    import tomllib

    path = tokens[-1].value
    try:
        with open(path, "rb") as file:
            options: dict[str, Any] = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror}; give a TOML file of options") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"--config {path} is not TOML: {error}") from None
    Dict(options, source=path, use_commands_as_keys=False)(app, commands, arguments)


def _check(request: ServeRequest) -> None:
    from causalrt.server.command import checked

    faults = Faults()
    with faults:
        if request.bundle is not None and request.text_encoder is None:
            raise ConfigError(
                "a bundle's prompts need --text-encoder FOLDER; without a bundle the demo model is served"
            )
    with faults:
        if request.bundle is None and request.text_encoder is not None:
            raise ConfigError(
                "--text-encoder belongs to a bundle; name the bundle, or leave both out to serve the demo model"
            )
    with faults:
        if request.bundle is None and request.executor not in (None, *(executor for executor, _ in ROWS)):
            raise ConfigError(
                f"the demo model is not built for {request.executor}; leave --executor out, or name a bundle"
            )
    with faults:
        checked(request)
    faults.report()


def serve(request: ServeRequest = ServeRequest()) -> int:
    """Serve a bundle: video jobs, real-time sessions, and a page to try them."""
    _check(request)

    def started(url: str) -> None:
        say(json.dumps({"url": url}) if request.json else f"serving at {url}", flush=True)

    from causalrt.server.command import run

    if request.bundle is not None:
        run(request, version=__version__, on_start=started)
        return 0
    from causalrt.demo_model import demo_files
    from causalrt.tools.demo import kept_demo_bundle

    with contextlib.ExitStack() as stack:
        with shown_progress() as progress:
            bundle = stack.enter_context(kept_demo_bundle(on_progress=progress))
        demo = replace(request, bundle=bundle, text_encoder=demo_files().words)
        run(demo, version=__version__, on_start=started, about=ABOUT, examples=PROMPTS)
    return 0
