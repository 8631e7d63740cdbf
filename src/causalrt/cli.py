"""The command line, `causalrt COMMAND`: find the command, parse its options, run it, and turn errors into exit codes.

    argv -> cyclopts -> a request -> commands/NAME.py

The modules of the commands import torch only when they run, so that help and mistakes in typing are answered at once.
"""

import contextlib
import importlib
import inspect
import logging
import os
import signal
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from cyclopts import App, CycloptsError, Group, MissingArgumentError, Parameter, UnusedCliTokensError
from cyclopts.help import DefaultFormatter

from causalrt import __version__
from causalrt.commands.output import EXIT_ERROR, EXIT_INTERRUPTED, EXIT_PIPE, say
from causalrt.control_groups import available_cpus
from causalrt.errors import CausalRTError
from causalrt.terminal import PrintableConsole, PrintableFormatter

if TYPE_CHECKING:
    from cyclopts.help import HelpPanel
    from rich.console import Console, ConsoleOptions

COMMANDS = ("demo", "build", "inspect", "generate", "serve", "compare", "plan", "bench", "gpu-day", "doctor")
"""In the order in which help lists them."""


class _Formatter(DefaultFormatter):
    """Shows help as one paragraph, although the docstring that it is taken from has several lines."""

    def __call__(self, console: "Console", options: "ConsoleOptions", panel: "HelpPanel") -> None:
        for entry in panel.entries:
            text = entry.description.primary_renderable
            text.plain = " ".join(text.plain.split())
        super().__call__(console, options, panel)


def _default(value: Any) -> str | None:
    """The default value as help shows it: nothing for flags, and for options that are empty unless they are given."""
    if value is None or value == () or isinstance(value, bool):
        return None
    return f"{value:g}" if isinstance(value, float) else str(value)


def _app(argv: Sequence[str]) -> App:
    app = App(
        name="causalrt",
        help="Causal video diffusion, compiled ahead of time and served in real time.",
        help_format="plaintext",
        help_formatter=_Formatter(),
        help_epilogue="`causalrt COMMAND --help` shows the options of a command, and examples.",
        version=f"causalrt {__version__}",
        group_parameters=Group("Options", sort_key=2),
        default_parameter=Parameter(negative="", show_default=_default, allow_repeating=True),  # the last one counts
        print_error=False,
        exit_on_error=False,
    )
    chosen = argv[:1] if argv and argv[0] in COMMANDS else COMMANDS  # help and mistakes need all of them
    for order, name in enumerate(chosen):
        module = importlib.import_module(f"causalrt.commands.{name.replace('-', '_')}")
        app.command(
            getattr(module, name.replace("-", "_")),
            name=name,
            sort_key=order,
            help_epilogue="Examples:\n" + textwrap.indent(module.EXAMPLES.strip(), "  "),
            config=getattr(module, "read_options", None),
        )
    app.register_install_completion_command(help="Install completion of commands and options for this shell.")
    for flag in ("--help", "--version", "--install-completion"):
        app[flag].group = "Options"
    return app


def _interrupt(number: int, frame: object) -> None:
    """End a command on SIGTERM as on Ctrl-C, so that nothing is left half-written; a second signal does not disturb that."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def parse(argv: Sequence[str]) -> tuple[Callable[..., Any], inspect.BoundArguments]:
    """Find what to call for a command line: the function of a command and its request, or what shows help or the version.

    Raises:
        CycloptsError: the command line is not understood.
        ConfigError: a file of options cannot be read.
    """
    function, arguments, _ = _app(argv).parse_args(argv, console=PrintableConsole())
    return function, arguments


def _run(argv: Sequence[str]) -> int:
    function, arguments = parse(argv)
    if not function.__module__.startswith("causalrt."):  # help, version or completion
        function(*arguments.args, **arguments.kwargs)
        return 0 if argv else EXIT_ERROR
    import torch

    torch.set_num_threads(min(torch.get_num_threads(), available_cpus()))
    code: int = function(*arguments.args, **arguments.kwargs)
    return code


def _message(error: CycloptsError) -> str:
    command = " ".join(("causalrt", *(error.command_chain or ())))
    text = str(error)
    if isinstance(error, UnusedCliTokensError):
        text = f"Unexpected argument: {' '.join(error.unused_tokens or ())}."
    elif isinstance(error, MissingArgumentError) and error.argument is not None and error.keyword is None:
        name = error.argument.name
        text = f"{command} needs {name.lstrip('-').upper() if error.argument.index is not None else name}."
    return f"{text}\nSee `{command} --help`."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0 success, 1 a comparison failed or `doctor` found GPUs that do not work, 2 an error, 130 interrupted,
        141 the reader of the output has closed it.
    """
    if logging.lastResort is not None:  # it shows the warnings of commands that configure no logging
        logging.lastResort.setFormatter(PrintableFormatter())
    before = None
    with contextlib.suppress(ValueError):  # not the main thread
        before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = _run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE
    except CycloptsError as error:
        say(f"error: {_message(error)}", file=sys.stderr)
        return EXIT_ERROR
    except CausalRTError as error:
        say(f"error: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        say("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
    return code


if __name__ == "__main__":
    sys.exit(main())
