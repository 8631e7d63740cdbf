"""`--cuda-graphs on|off` reaches the engine, whichever command loads it."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from support.small_bundles import bundle_factory, tiny_config, write_checkpoint

from causalrt.cli import main
from causalrt.errors import ExecutorError
from causalrt.proof import compare, replica
from causalrt.runtime import load as load_module
from causalrt.runtime import start
from causalrt.tools import demo

COMMANDS = {
    "generate": "generate {bundle} --prompt-embeds {embeds} --out {folder}/latents.safetensors",
    "compare, a bundle": "compare {bundle} --executor eager --chunks 1",
    "compare, a recording": "compare --recorded absent.safetensors --executor eager",
    "serve": "serve {bundle} --text-encoder {folder} --port 0",
    "demo": "demo --out {folder}/demo",
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return bundle_factory(tmp_path_factory.mktemp("bundle"))(1)


@pytest.fixture
def loaded(bundle, monkeypatch, tmp_path):
    """What each engine would be loaded with; nothing else of a command is done."""
    found = []

    def refuse(opened, options):
        found.append(options.cuda_graphs)
        raise ExecutorError("no engine is wanted here")

    @contextlib.contextmanager
    def kept(**options):
        yield bundle

    monkeypatch.setattr(load_module, "start_engine", refuse)
    monkeypatch.setattr(load_module, "check_has_vae", lambda opened: None)
    monkeypatch.setattr(start, "open_text_encoder", lambda *arguments: SimpleNamespace())
    monkeypatch.setattr(demo, "kept_demo_bundle", kept)
    recording = SimpleNamespace(
        config=tiny_config(1), write_checkpoint=lambda path: write_checkpoint(tiny_config(1), path)
    )
    monkeypatch.setattr(compare, "open_recording", lambda path, **options: recording)
    return found


@pytest.fixture
def embeds(tmp_path):
    path = tmp_path / "prompt.pt"
    torch.save(torch.zeros(2, tiny_config(1).model.text_dim), path)
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_it_reaches_the_engine(bundle, embeds, loaded, tmp_path, command):
    pytest.importorskip("fastapi", reason="the server needs FastAPI: pip install 'causalrt[serve]'")
    pytest.importorskip("polygraphy", reason="a certificate needs Polygraphy: pip install 'causalrt[proof]'")
    words = COMMANDS[command].format(bundle=bundle, embeds=embeds, folder=tmp_path).split()
    for options, wanted in (([], True), (["--cuda-graphs", "off"], False), (["--cuda-graphs", "on"], True)):
        loaded.clear()
        assert main([*words, *options]) in (1, 2)
        assert loaded == [wanted]


def test_it_reaches_the_executors_of_a_certificate(bundle, loaded, monkeypatch):
    pytest.importorskip("polygraphy", reason="a certificate needs Polygraphy: pip install 'causalrt[proof]'")
    made = []
    right = replica.make_executor

    def make_executor(name, *arguments, cuda_graphs, **options):
        made.append((name, cuda_graphs))
        return right("eager", *arguments, **options)

    monkeypatch.setattr(replica, "make_executor", make_executor)
    monkeypatch.setattr("causalrt.engines.inductor.check_can_compile", lambda: None)
    words = ["compare", str(bundle), "--executor", "inductor", "--chunks", "1", "--no-processes"]
    assert main([*words, "--cuda-graphs", "off"]) == 0
    assert [graphs for name, graphs in made if name == "inductor"] == [False]


def test_other_words_are_refused(capsys):
    assert main(["generate", "bundle", "--prompt", "a fox", "--out", "a.mp4", "--cuda-graphs", "both"]) == 2
    assert 'Invalid value "both" for --cuda-graphs. Choose from: "on", "off".' in capsys.readouterr().err
