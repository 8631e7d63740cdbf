"""How the command line answers before a command runs: help, mistakes in typing, options from a file."""

import json
import subprocess
import sys

import pytest

import causalrt
from causalrt.child_python import python_environment
from causalrt.cli import COMMANDS, main, parse
from causalrt.engines.kinds import EXECUTORS
from causalrt.options import ExecutorName

MAIN = """
import json, sys, time
from causalrt.cli import main
code = main(sys.argv[1:])
heavy = [name for name in ("torch", "numpy", "onnx", "onnxruntime", "transformers") if name in sys.modules]
print(json.dumps({"code": code, "heavy": heavy}), file=sys.stderr)
"""


def answer(*words, environment=None):
    """(exit code, heavy modules that were imported, stdout, stderr) of a command line in a process of its own."""
    env = {**python_environment(), "COLUMNS": "80", **(environment or {})}
    done = subprocess.run([sys.executable, "-c", MAIN, *words], env=env, capture_output=True, timeout=120, check=True)
    stderr, _, found = done.stderr.decode().rstrip().rpartition("\n")
    found = json.loads(found)
    return found["code"], found["heavy"], done.stdout.decode(), stderr


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--help"], 0, "Compile a checkpoint into a bundle."),
        (["--version"], 0, f"causalrt {causalrt.__version__}"),
        ([], 2, "Usage: causalrt COMMAND"),
        (["biuld"], 2, 'Did you mean "build"?'),
        (["build", "--recpie", "tiny"], 2, "Unknown option: --recpie. Did you mean --recipe?"),
        (["build", "--dtype", "fp23"], 2, 'Did you mean "fp32"?'),
        (["build", "--world-size", "two"], 2, 'unable to convert "two" into int'),
        (["generate", "--out", "a.mp4"], 2, "causalrt generate needs BUNDLE."),
        (["doctor", "now"], 2, "Unexpected argument: now."),
    ],
    ids=lambda value: "-".join(value)[:20] if isinstance(value, list) else "",
)
def test_help_and_mistakes_need_no_torch(words, code, said):
    found, heavy, stdout, stderr = answer(*words)
    assert (found, heavy) == (code, [])
    assert said in stdout + stderr
    if code and words:
        first, second = stderr.splitlines()
        assert first.startswith("error: ")
        assert second.startswith("See `causalrt ")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_needs_no_torch_and_fits_a_terminal(command):
    code, heavy, stdout, _ = answer(command, "--help")
    assert (code, heavy) == (0, [])
    assert max(map(len, stdout.splitlines())) <= 80
    assert "Examples:" in stdout
    assert "see `" not in stdout  # each option has a help text of its own


def test_help_reaches_a_terminal_that_knows_ascii_alone():
    code, _, stdout, _ = answer("--help", environment={"PYTHONIOENCODING": "ascii", "NO_COLOR": "1"})
    assert code == 0
    assert stdout.isascii()
    assert "Compile a checkpoint into a bundle." in stdout


def test_importing_the_package_imports_nothing_heavy():
    check = "import causalrt, sys; print([name for name in ('torch', 'numpy') if name in sys.modules], 'load' in dir(causalrt))"
    done = subprocess.run([sys.executable, "-c", check], env=python_environment(), capture_output=True, timeout=120)
    assert done.stdout.decode().strip() == "[] True"


def test_every_public_name_can_be_imported():
    assert set(causalrt.__all__) <= set(dir(causalrt))
    for name in causalrt.__all__:
        assert getattr(causalrt, name).__module__.startswith("causalrt.") if name != "RECIPES" else causalrt.RECIPES
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        causalrt.nothing  # noqa: B018


def test_the_options_know_every_executor():
    assert set(ExecutorName.__args__) == set(EXECUTORS)


def serve_request(*words):
    _, bound = parse(["serve", *words])
    return bound.arguments["request"]


def test_plugins_is_an_alias_of_fused_ops():
    for flag in ("--fused-ops", "--plugins"):
        _, bound = parse(["build", flag, "on"])
        assert bound.arguments["request"].fused_ops == "on"


def test_serve_reads_options_from_a_file(tmp_path):
    file = tmp_path / "serve.toml"
    file.write_text(
        'bundle = "some/bundle"\nport = 9000\nmax-queue = 8\nno-auth = true\nkeep = 60.5\n'
        'allow-origin = ["https://a.example", "https://b.example"]\n'
    )
    request = serve_request("--config", str(file), "--port", "0")
    assert (str(request.bundle), request.port, request.max_queue, request.no_auth) == ("some/bundle", 0, 8, True)
    assert (request.job_ttl_s, request.allowed_origins) == (60.5, ("https://a.example", "https://b.example"))


@pytest.mark.parametrize(
    ("contents", "said"),
    [
        (None, "cannot be read: No such file or directory"),
        ("port = ", "is not TOML"),
        ("prot = 9000", 'Unknown option: "[prot]"'),
        ("port = 'many'", 'unable to convert "many" into int'),
    ],
)
def test_a_file_of_options_that_cannot_be_is_one_error(contents, said, tmp_path, capsys):
    file = tmp_path / "serve.toml"
    if contents is not None:
        file.write_text(contents)
    assert main(["serve", "--config", str(file)]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert said in printed.err
    assert "serve.toml" in printed.err
