"""What would be waited for, or never ends, is refused wherever a file is read, and links to regular files are followed."""

import os
import signal
import stat

import pytest
import torch
from safetensors.torch import save_file

from causalrt.errors import CausalRTError
from causalrt.export.checkpoint import open_checkpoint
from causalrt.model.codecs.registry import load_vae
from causalrt.model.codecs.vae_checkpoint import DIFFUSERS_FILE, WAN_FILE
from causalrt.model.stored_tensors import map_tensors
from causalrt.model.text.umt5_files import find_encoder_files, open_weights
from causalrt.model.text.words import WORDS_FILE, WordEncoder
from causalrt.proof.recording import open_recording
from causalrt.regular_files import regular_file
from causalrt.tools.files import read_latents, read_prompt_embeds
from causalrt.tools.plan.calibration import read_calibration
from causalrt.user_cache import read_cache

INDEX = "diffusion_pytorch_model.safetensors.index.json"


KINDS = {
    "pipe": os.mkfifo,
    "link to a pipe": lambda path: (os.mkfifo(path.parent / "pipe"), path.symlink_to("pipe")),
    "socket": lambda path: os.mknod(path, stat.S_IFSOCK | 0o600),
    "link to a device": lambda path: path.symlink_to("/dev/zero"),
    "link to nothing": lambda path: path.symlink_to("nothing"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "nothing": lambda path: None,
}
READERS = {
    "checkpoint.pt": open_checkpoint,
    "checkpoint.safetensors": open_checkpoint,
    INDEX: open_checkpoint,
    f"transformer/{DIFFUSERS_FILE}": lambda path: open_checkpoint(path.parent.parent),
    f"transformer/{INDEX}": lambda path: open_checkpoint(path.parent.parent),
    WAN_FILE: load_vae,
    DIFFUSERS_FILE: load_vae,
    f"vae/{DIFFUSERS_FILE}": lambda path: load_vae(path.parent),
    "models_t5_umt5-xxl-enc-bf16.pth": lambda path: find_encoder_files(path.parent),
    "text_encoder/model.safetensors": lambda path: find_encoder_files(path.parent.parent),
    "model.safetensors.index.json": open_weights,
    "any.pth": map_tensors,
    "any.safetensors": map_tensors,
    WORDS_FILE: lambda path: WordEncoder.from_folder(path.parent),
    "embeds.safetensors": read_prompt_embeds,
    "embeds.npy": read_prompt_embeds,
    "embeds.pt": read_prompt_embeds,
    "latents.safetensors": read_latents,
    "recording.safetensors": lambda path: open_recording(path, world_size=1),
    "calibration.json": read_calibration,
}


@pytest.fixture(autouse=True)
def no_endless_reading():
    def tell(*_):
        raise TimeoutError("it is being read for ever")

    before = signal.signal(signal.SIGALRM, tell)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", READERS)
def test_what_cannot_be_read_to_an_end_is_refused_by_name(tmp_path, name, kind):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    KINDS[kind](path)
    with pytest.raises(CausalRTError, match=str(tmp_path)) as caught:
        READERS[name](path)
    assert not isinstance(caught.value.__cause__, TimeoutError)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_that_cannot_be_read_is_as_none(tmp_path, kind):
    KINDS[kind](tmp_path / "cache")
    assert read_cache(tmp_path / "cache") == b""


def test_a_link_to_a_regular_file_is_followed(tmp_path):
    tensors = {"latents": torch.arange(6.0).view(1, 6)}
    save_file(tensors, tmp_path / "blob")
    for name in ("embeds.safetensors", "latents.safetensors"):
        (tmp_path / name).symlink_to("blob")
    assert regular_file(tmp_path / "embeds.safetensors") == tmp_path / "embeds.safetensors"
    assert torch.equal(read_latents(tmp_path / "latents.safetensors"), tensors["latents"])
    assert torch.equal(read_prompt_embeds(tmp_path / "embeds.safetensors"), tensors["latents"])
    assert set(open_checkpoint(tmp_path / "latents.safetensors").shapes) == {"latents"}
    assert set(map_tensors(tmp_path / "latents.safetensors")) == {"latents"}
