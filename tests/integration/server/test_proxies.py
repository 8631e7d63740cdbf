"""What talks to a server on this machine does so whatever proxies the environment names."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import av
import pytest
from support.running import Running

ROOT = Path(__file__).parents[3]
OPENAI, REALTIME = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "server.md").read_text(), flags=re.DOTALL)
DEAD = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "all_proxy": "socks5://127.0.0.1:9"}


@pytest.fixture(scope="module")
def server():
    with Running() as running:
        yield running


@pytest.fixture
def behind_dead_proxies(tmp_path):
    """Runs Python with these arguments; its standard output."""
    environment = {name: value for name, value in os.environ.items() if name.lower() != "no_proxy"}
    environment |= DEAD | {name.upper(): value for name, value in DEAD.items()}

    def run(*arguments):
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.mark.parametrize(
    ("client", "frames"),
    [
        pytest.param(
            OPENAI,
            64,
            marks=pytest.mark.skipif(not importlib.util.find_spec("openai"), reason="needs openai, OpenAI's client"),
        ),
        (REALTIME, 81),
    ],
    ids=["openai", "websockets"],
)
def test_the_clients_of_the_docs_reach_the_server(server, behind_dead_proxies, tmp_path, client, frames):
    address = server.url.removeprefix("http://")
    assert "127.0.0.1:8000" in client
    behind_dead_proxies("-c", client.replace("127.0.0.1:8000", address))
    with av.open(tmp_path / "fox.mp4") as container:
        assert sum(1 for _ in container.decode(video=0)) == frames


def test_the_load_generator_reaches_the_server(server, behind_dead_proxies):
    flags = ("--url", server.url, "--clients", "2", "--chunks", "2", "--seconds", "1", "--json")
    found = json.loads(behind_dead_proxies(ROOT / "benchmarks" / "serve_load.py", *flags))
    assert found["many_at_once"]["served"] == 2
