"""A bit that has changed in a torch file is noticed wherever such files are read."""

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from causalrt.errors import CheckpointError, PromptError
from causalrt.export.checkpoint import open_checkpoint
from causalrt.model.stored_tensors import map_tensors
from causalrt.model.torch_archive import TorchArchive
from causalrt.tools.files import read_prompt_embeds

STATE = {"one": torch.arange(20.0), "two": torch.full((3, 7), 2.5, dtype=torch.bfloat16), "none": torch.zeros(0)}


def read_checkpoint(path):
    checkpoint = open_checkpoint(path)
    return {name: checkpoint.tensor(name) for name in checkpoint.shapes}


def flip(path, position, bit=0):
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def place_of(path, tensor):
    """Where the bytes of a tensor are in the file."""
    raw = tensor.flatten().view(torch.uint8).numpy().tobytes()
    data = path.read_bytes()
    assert data.count(raw) == 1
    return data.index(raw), len(raw)


@pytest.mark.parametrize("read", [map_tensors, read_checkpoint])
def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path, read):
    whole, path = tmp_path / "whole.pt", tmp_path / "x.pt"
    torch.save(STATE, whole)
    size, refused = whole.stat().st_size, 0
    for position in range(0, size, 5):
        path.write_bytes(whole.read_bytes())
        flip(path, position, position % 8)
        try:
            found = read(path)
        except CheckpointError:
            refused += 1
            continue
        assert found.keys() == STATE.keys()
        assert all(torch.equal(found[name], STATE[name]) for name in STATE), f"bit {position % 8} of {position}"
    assert 0.2 < refused / (size / 5) < 1, "what lies between the members, and its names in headers, plays no part"


@pytest.mark.parametrize("read", [map_tensors, read_checkpoint])
@pytest.mark.parametrize("name", ["one", "two"])
def test_the_file_and_what_to_do_are_named(tmp_path, read, name):
    path = tmp_path / "x.pt"
    torch.save(STATE, path)
    start, length = place_of(path, STATE[name])
    flip(path, start + length // 2)
    with pytest.raises(CheckpointError, match=rf"{re.escape(str(path))} is damaged: x/data/\d.*download or copy it"):
        read(path)


def test_only_what_is_read_of_a_checkpoint_is_checked(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"generator": {"a": STATE["one"] + 1}, "generator_ema": {"a": STATE["one"]}}, path)
    flip(path, place_of(path, STATE["one"] + 1)[0])
    assert torch.equal(open_checkpoint(path).tensor("a"), STATE["one"])
    flip(path, place_of(path, STATE["one"])[0])
    with pytest.raises(CheckpointError, match="damaged"):
        open_checkpoint(path).tensor("a")


def test_tensors_that_share_a_storage_are_checked_with_it(tmp_path):
    flat, path = torch.arange(1000.0), tmp_path / "x.pt"
    torch.save({"first": flat[:10], "last": flat[990:].view(2, 5).t()}, path)
    assert torch.equal(open_checkpoint(path).tensor("last"), flat[990:].view(2, 5).t())
    flip(path, place_of(path, flat)[0] + 4 * 995)
    for name in ("first", "last"):
        with pytest.raises(CheckpointError, match="damaged"):
            open_checkpoint(path).tensor(name)


def test_a_file_that_was_saved_without_checksums_is_taken_with_a_warning(tmp_path, caplog):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(STATE, tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(map_tensors(tmp_path / "x.pt")["one"], STATE["one"])
    assert "x.pt was saved without checksums" in caplog.text


def test_prompt_embeddings_are_checked_too(tmp_path):
    path = tmp_path / "x.pt"
    torch.save(STATE["one"].view(4, 5), path)
    flip(path, place_of(path, STATE["one"])[0])
    with pytest.raises(PromptError, match=r"x\.pt is damaged"):
        read_prompt_embeds(path)


def test_what_is_no_archive(tmp_path):
    (tmp_path / "x.pt").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(CheckpointError, match=r"x\.pt is damaged: its table of members cannot be read"):
        TorchArchive(tmp_path / "x.pt")


@pytest.mark.parametrize(("cpus", "threads"), [(1, 1), (64, 4)])
def test_members_are_checked_by_as_many_threads_as_a_quota_allows(tmp_path, monkeypatch, cpus, threads):
    torch.save(STATE, tmp_path / "x.pt")
    asked = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, workers):
            asked.append(workers)
            super().__init__(workers)

    monkeypatch.setattr("causalrt.model.torch_archive.ThreadPoolExecutor", Pool)
    monkeypatch.setattr("causalrt.model.torch_archive.available_cpus", lambda: cpus)
    TorchArchive(tmp_path / "x.pt").check_all()
    assert asked == [threads]
