"""The table of words: what prompts become, what is refused, and files that are none."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from causalrt.errors import CheckpointError, PromptError
from causalrt.model.text.words import MAX_PROMPT_CHARS, WORDS_FILE, WordEncoder
from causalrt.recipes import recipe
from causalrt.runtime.start import open_text_encoder

TABLE = torch.arange(12, dtype=torch.float32).view(4, 3)
WORDS = {"red": (0,), "circle": (1,), "moves": (2,), "right": (3,), "ball": (1,), "rolls": (2, 3), "the": ()}


@pytest.fixture
def encoder():
    return WordEncoder(TABLE, WORDS, max_tokens=3)


@pytest.mark.parametrize(
    ("prompt", "rows"),
    [
        ("red circle", [0, 1]),
        ("The RED ball!", [0, 1]),
        ("the ball rolls", [1, 2, 3]),
        ("red, red; the red", [0]),
    ],
)
def test_a_prompt_is_the_rows_of_its_words(encoder, prompt, rows):
    assert torch.equal(encoder.encode(prompt), TABLE[rows])


def test_the_rows_are_the_callers(encoder):
    encoder.encode("red").zero_()
    assert torch.equal(encoder.encode("circle"), TABLE[[1]])
    assert torch.equal(encoder.encode("red"), TABLE[[0]])


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("red fox in red snow", "does not know fox, in, snow; its words are: circle, moves, red, right, rolls$"),
        ("the", "1 to 3 words that say something"),
        ("", "1 to 3 words"),
        ("red circle moves right", "1 to 3 words"),
        ("red " * MAX_PROMPT_CHARS, f"{MAX_PROMPT_CHARS} characters"),
        (b"red", "must be a str"),
    ],
)
def test_what_is_no_prompt_is_refused_in_one_line(encoder, prompt, words):
    with pytest.raises(PromptError, match=words) as caught:
        encoder.encode(prompt)
    assert "\n" not in str(caught.value)


def test_a_folder_with_words_is_opened_without_umt5(tmp_path):
    model = recipe("tiny").model
    encoder = WordEncoder(torch.randn(4, model.text_dim), WORDS, max_tokens=9)
    encoder.save(tmp_path)
    opened = open_text_encoder(tmp_path, "cuda:7", recipe("tiny"))  # a device plays no part
    assert (opened.layout, opened.words, opened.max_tokens) == ("words", WORDS, model.text_len)
    assert torch.equal(opened.encode("red ball"), encoder.encode("red ball"))
    code = (
        "import sys; from pathlib import Path; from causalrt import recipe;"
        "from causalrt.runtime.start import open_text_encoder;"
        f"open_text_encoder(Path({str(tmp_path)!r}), 'cpu', recipe('tiny')).encode('red');"
        "sys.exit(bool({'transformers', 'tokenizers', 'ftfy'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


def test_words_of_another_model_are_refused(tmp_path):
    WordEncoder(TABLE, WORDS, max_tokens=3).save(tmp_path)
    with pytest.raises(CheckpointError, match="width 3, but the model wants text_dim 24"):
        open_text_encoder(tmp_path, "cpu", recipe("tiny"))


@pytest.mark.parametrize(
    ("table", "words", "message"),
    [
        (TABLE, None, "no table of words"),
        (TABLE, "not JSON", "no table of words"),
        (TABLE, "[" * 100_000, "no table of words"),
        (TABLE, json.dumps(["red"]), "no table of words"),
        (TABLE, json.dumps({"red": 0}), "no table of words"),
        (TABLE, json.dumps({"red": ["x"]}), "no table of words"),
        (TABLE, json.dumps({"red": "12"}), "no table of words"),
        (TABLE, json.dumps({"red": [1.9]}), "no table of words"),
        (TABLE, json.dumps({"red": [True]}), "no table of words"),
        (TABLE.to(torch.float8_e4m3fn), json.dumps(WORDS), "finite \\[words, text_dim\\]"),
        (TABLE, '{"red": [Infinity]}', "no table of words"),
        (TABLE, json.dumps({"red": [4]}), "not in its table of 4: red"),
        (TABLE, json.dumps({"red": [-1]}), "not in its table of 4: red"),
        (TABLE[0], json.dumps(WORDS), "finite \\[words, text_dim\\]"),
        (TABLE.int(), json.dumps(WORDS), "finite \\[words, text_dim\\]"),
        (TABLE / 0, json.dumps(WORDS), "finite \\[words, text_dim\\]"),
    ],
)
def test_a_hostile_file_is_refused(tmp_path, table, words, message):
    save_file(
        {"embedding.weight": table.contiguous()}, tmp_path / WORDS_FILE, None if words is None else {"words": words}
    )
    with pytest.raises(CheckpointError, match=message):
        WordEncoder.from_folder(tmp_path)


@pytest.mark.parametrize("contents", [b"", b"\xff" * 100, b"PK\x03\x04"])
def test_what_is_no_file_of_tensors_is_refused(tmp_path, contents):
    (tmp_path / WORDS_FILE).write_bytes(contents)
    with pytest.raises(CheckpointError, match="no table of words"):
        WordEncoder.from_folder(tmp_path)
    with pytest.raises(CheckpointError, match="no table of words"):
        WordEncoder.from_folder(tmp_path / "nowhere")
