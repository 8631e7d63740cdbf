"""What the README says works, word by word."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
from safetensors.torch import save_file

from causalrt.cli import parse
from causalrt.config import override
from causalrt.export.build import build
from causalrt.export.random_encoders import SMALL_VAE, random_vae, write_text_encoder
from causalrt.export.random_weights import random_weights
from causalrt.recipes import recipe

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [
    line.partition("causalrt ")[2]
    for language, block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    if language == "sh" and "causalrt " in line
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses(command):
    function, arguments = parse(shlex.split(command))
    assert function.__module__.startswith("causalrt.commands.")
    assert all(map(dataclasses.is_dataclass, arguments.arguments.values()))


def test_every_linked_file_exists():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).is_file(), target


def test_the_python_example_runs(tmp_path, monkeypatch, capsys):
    config = override(recipe("tiny"), {"model.text_len": "20"})
    save_file(dict(random_weights(config.model, seed=0)), tmp_path / "checkpoint.safetensors")
    write_text_encoder(tmp_path / "Wan2.1-T2V-1.3B", text_dim=config.model.text_dim)
    random_vae(SMALL_VAE, seed=0).save_pretrained(tmp_path / "vae")
    build(config, checkpoint=tmp_path / "checkpoint.safetensors", vae=tmp_path, out=tmp_path / "bundle")
    monkeypatch.chdir(tmp_path)
    (example,) = [block for language, block in BLOCKS if language == "python"]
    exec(compile(example, "README.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(" torch.Size")[1].split(")")[0] for line in printed] == [
        f"([{frames}, 32, 48, 3]" for frames in (9, 12, 12, 12)
    ]
