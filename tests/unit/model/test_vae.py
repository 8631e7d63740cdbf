"""The streaming VAE against diffusers' own whole decode, on small random VAEs in every layout."""

import json
import pickle
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tolerances import ROUNDED
from torch._subclasses.fake_tensor import FakeTensorMode

from causalrt.errors import CheckpointError, ExecutorError, RequestError
from causalrt.install_hint import install_extra
from causalrt.model.codecs import vae_checkpoint
from causalrt.model.codecs.decode_state import CONFIG_KEY, cache_name, pixels_from_signal
from causalrt.model.codecs.registry import cache_bytes, encode, load_vae
from causalrt.model.codecs.vae_checkpoint import DIFFUSERS_FILE, WAN_FILE, VaeConfig, empty_vae
from causalrt.model.codecs.wan_vae import CACHED_FRAMES, FirstFrame, NextFrame, StreamingDecoder, cache_slots

diffusers = pytest.importorskip("diffusers", reason="the VAE is diffusers': pip install '.[video]'")

HEIGHT, WIDTH = 3, 5
"""Of a latent: odd, and different."""


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Small convolutions on several threads wait for each other, at great length where the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small_vae(seed=0, *, dtype=torch.float32, **config):
    torch.manual_seed(seed)
    config = {"base_dim": 8, "num_res_blocks": 2} | config
    made = diffusers.AutoencoderKLWan(**config)
    state = {
        name: (tensor + 0.2 * torch.randn_like(tensor) * ("gamma" in name)).to(dtype)  # no two tensors are equal
        for name, tensor in made.state_dict().items()
    }
    made.load_state_dict(state, assign=True)
    return made.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def vae():
    return small_vae()


def random_latents(num, seed=1, size=(HEIGHT, WIDTH)):
    return torch.randn(num, 16, *size, generator=torch.Generator().manual_seed(seed))


def denormalised(vae, latents):
    mean, std = (torch.tensor(vae.config[f"latents_{name}"]).view(1, -1, 1, 1) for name in ("mean", "std"))
    return (latents * std + mean).to(vae.dtype)


def whole(vae, latents):
    """diffusers' decode of all latents at once, `[T, 3, height, width]`."""
    batch = denormalised(vae, latents).transpose(0, 1).unsqueeze(0)
    with torch.no_grad():
        return vae.decode(batch).sample[0].transpose(0, 1).float()


def stream(state, latents, pattern):
    return torch.cat([state.decode_float(chunk) for chunk in latents.split(pattern)])


# ---- files


def wan_name(name):
    """The name in Wan's own file of a tensor that diffusers calls `name`, for two residual blocks a stage."""
    single = {"quant_conv": "conv1", "post_quant_conv": "conv2"}
    module, _, leaf = name.rpartition(".")
    if module in single:
        return f"{single[module]}.{leaf}"
    name = re.sub(r"\.conv_in\.", ".conv1.", name)
    name = name.replace(".norm_out.", ".head.0.").replace(".conv_out.", ".head.2.")
    name = name.replace(".mid_block.attentions.0.", ".middle.1.")
    name = re.sub(r"\.mid_block\.resnets\.(\d)\.", lambda found: f".middle.{2 * int(found[1])}.", name)
    name = name.replace("encoder.down_blocks.", "encoder.downsamples.")
    up = r"decoder\.up_blocks\.(\d)\.resnets\.(\d)\."
    name = re.sub(up, lambda found: f"decoder.upsamples.{4 * int(found[1]) + int(found[2])}.", name)
    up = r"decoder\.up_blocks\.(\d)\.upsamplers\.0\."
    name = re.sub(up, lambda found: f"decoder.upsamples.{4 * int(found[1]) + 3}.", name)
    if ".samples." in name or "samples." in name or ".middle." in name:
        parts = {"norm1": "residual.0", "norm2": "residual.3", "conv_shortcut": "shortcut"}
        parts |= {} if ".middle.1." in name else {"conv1": "residual.2", "conv2": "residual.6"}
        name = ".".join(parts.get(part, part) for part in name.split("."))
    return name


def write_wan(vae, folder, change=lambda state: None):
    folder.mkdir(exist_ok=True)
    state = {wan_name(name): tensor.clone() for name, tensor in vae.state_dict().items()}
    change(state)
    torch.save(state, folder / WAN_FILE)
    return folder


def write_diffusers(vae, folder, **changes):
    vae.save_pretrained(folder / "vae")
    config = folder / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    return folder


def write_single(vae, folder):
    """As a bundle has it."""
    folder.mkdir(exist_ok=True)
    config = json.dumps(VaeConfig.from_mapping(vae.config).to_mapping())
    save_file(dict(vae.state_dict()), folder / "vae.safetensors", {CONFIG_KEY: config})
    return folder / "vae.safetensors"


def assert_same(loaded, vae):
    assert VaeConfig.from_mapping(loaded.config) == VaeConfig.from_mapping(vae.config)
    state, wanted = loaded.state_dict(), vae.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("write", [write_wan, write_diffusers, write_single])
def test_every_layout_is_the_same_vae(vae, tmp_path, write):
    loaded = load_vae(write(vae, tmp_path / "release"))
    assert_same(loaded, vae)
    latents = random_latents(2)
    assert torch.equal(StreamingDecoder(loaded).open().decode_float(latents), whole(vae, latents))


def test_a_vae_folder_and_a_weight_file_are_taken_too(vae, tmp_path):
    wan, other = write_wan(vae, tmp_path / "wan"), write_diffusers(vae, tmp_path / "diffusers") / "vae"
    for path in (wan / WAN_FILE, other, other / DIFFUSERS_FILE):
        assert_same(load_vae(path), vae)


def test_sizes_are_those_of_the_files(tmp_path):
    wide = small_vae(base_dim=6, decoder_base_dim=10)
    loaded = load_vae(write_wan(wide, tmp_path / "wan"))
    assert (loaded.config.base_dim, loaded.config.decoder_base_dim) == (6, 10)
    assert load_vae(write_diffusers(small_vae(num_res_blocks=1), tmp_path / "short")).config.num_res_blocks == 1
    few = {"z_dim": 2, "latents_mean": [0.5, -1.0], "latents_std": [2.0, 0.25]}
    config = VaeConfig.from_mapping(load_vae(write_diffusers(small_vae(**few), tmp_path / "few")).config)
    assert (config.z_dim, config.latents_mean, config.latents_std) == (2, (0.5, -1.0), (2.0, 0.25))


def test_weights_take_the_wanted_type(vae, tmp_path):
    loaded = load_vae(write_wan(vae, tmp_path / "wan"), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


def test_the_defaults_are_those_of_diffusers():
    with torch.device("meta"):
        assert VaeConfig.from_mapping(diffusers.AutoencoderKLWan().config) == VaeConfig()
    assert VaeConfig.from_mapping(empty_vae(VaeConfig()).config) == VaeConfig()
    assert sum(parameter.numel() for parameter in empty_vae(VaeConfig()).parameters()) == 126_892_531


def test_what_is_no_vae_is_refused(vae, tmp_path):
    with pytest.raises(CheckpointError, match=r"looked for:(.|\n)*config.json(.|\n)*Wan2.1_VAE.pth"):
        load_vae(tmp_path)
    with pytest.raises(CheckpointError, match="no VAE at"):
        load_vae(tmp_path / "nowhere.pth")
    bare = tmp_path / "bare.safetensors"
    save_file(dict(vae.state_dict()), bare)
    with pytest.raises(CheckpointError, match="no config in its header"):
        load_vae(bare)
    bare.write_bytes(b"no safetensors")
    with pytest.raises(CheckpointError, match="damaged"):
        load_vae(bare)


def test_code_in_a_file_is_not_run(tmp_path):
    class Code:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"conv1.weight": Code()}, tmp_path / WAN_FILE, pickle_module=pickle)
    with pytest.raises(CheckpointError, match="holds code"):
        load_vae(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_bad_tensors_are_listed_together(vae, tmp_path):
    def spoil(state):
        del state["decoder.middle.0.residual.2.bias"]
        state["decoder.more"] = torch.zeros(1)
        state["encoder.head.2.bias"] = torch.zeros(7)
        state["conv1.bias"] = state["conv1.bias"].to(torch.int32)

    with pytest.raises(CheckpointError) as caught:
        load_vae(write_wan(vae, tmp_path / "wan", spoil))
    message = str(caught.value)
    assert "missing (1): decoder.mid_block.resnets.0.conv1.bias" in message
    assert "extra (1): decoder.more" in message
    assert "misshapen (2): encoder.conv_out.bias (got torch.float32 [7], wanted floating [32])" in message
    assert "quant_conv.bias (got torch.int32" in message


def test_values_that_are_not_finite_are_refused(vae, tmp_path):
    def spoil(state):
        state["conv1.bias"][3] = float("nan")
        state["decoder.head.2.bias"][0] = 1e6

    folder = write_wan(vae, tmp_path / "wan", spoil)
    with pytest.raises(CheckpointError, match=r"not finite in torch.float32: quant_conv.bias$"):
        load_vae(folder)
    with pytest.raises(CheckpointError, match=r"torch.float16: decoder.conv_out.bias, quant_conv.bias$"):
        load_vae(folder, dtype=torch.float16)


def test_a_wan_file_of_another_topology_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="missing"):
        load_vae(write_wan(small_vae(num_res_blocks=1), tmp_path / "short"))

    def shrink(state):
        state["conv2.weight"] = state["conv2.weight"][:4, :4]

    with pytest.raises(CheckpointError, match=r"latents of 4 channels.*diffusers layout"):
        load_vae(write_wan(small_vae(), tmp_path / "few", shrink))

    def rename(state):
        state["decoder.upsamples.x.weight"] = torch.zeros(1)

    with pytest.raises(CheckpointError, match=r"no Wan2\.1 VAE has"):
        load_vae(write_wan(small_vae(), tmp_path / "name", rename))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"is_residual": True}, "is_residual True, wanted False"),
        ({"patch_size": 2}, "patch_size 2"),
        ({"_class_name": "AutoencoderKL"}, "AutoencoderKLWan"),
        ({"base_dim": "8"}, "base_dim '8'"),
        ({"base_dim": 0}, "base_dim 0"),
        ({"num_res_blocks": 1000}, "num_res_blocks 1000"),
        ({"dim_mult": [1, 2, 4]}, "dim_mult"),
        ({"temperal_downsample": [True, True, True]}, "temperal_downsample"),
        ({"temperal_downsample": [0, 1, 1]}, "temperal_downsample"),
        ({"latents_mean": [0.0] * 15}, "latents_mean of 15 values"),
        ({"latents_std": [0.0] * 16}, "latents_std that is not positive"),
        ({"latents_std": [float("nan")] * 16}, "latents_std"),
    ],
)
def test_a_config_that_cannot_be_is_refused(change, message):
    plain = VaeConfig().to_mapping() | {"_class_name": "AutoencoderKLWan"} | change
    with pytest.raises(CheckpointError, match=re.escape(message)):
        VaeConfig.from_mapping(plain)


@pytest.mark.parametrize("text", ["", "[1]", "{", "null"])
def test_an_unreadable_config_is_refused(vae, tmp_path, text):
    folder = write_diffusers(vae, tmp_path / "release")
    (folder / "vae" / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="config"):
        load_vae(folder)


def test_the_config_must_fit_the_tensors(vae, tmp_path):
    with pytest.raises(CheckpointError, match="misshapen"):
        load_vae(write_diffusers(vae, tmp_path / "release", base_dim=12))


def test_without_diffusers_it_says_what_to_install(vae, tmp_path, monkeypatch):
    folder = write_wan(vae, tmp_path / "wan")
    for name in ("diffusers", "diffusers.loaders.single_file_utils"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ExecutorError, match=re.escape(install_extra("video"))):
        load_vae(folder)


def test_diffusers_is_imported_when_it_is_needed():
    modules = "causalrt.model.codecs.wan_vae, causalrt.engines.vae, causalrt.export.vae"
    code = f"import sys, {modules}; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- decoding


@pytest.mark.parametrize("pattern", [[3, 3, 3], [1, 3, 3], [3, 6], [1] * 7, [7]], ids=str)
def test_a_stream_is_the_whole_video_to_the_bit(vae, pattern):
    latents = random_latents(sum(pattern))
    wanted = whole(vae, latents)
    assert 0.1 < wanted.std() < 0.9
    assert torch.equal(stream(StreamingDecoder(vae).open(), latents, pattern), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_stream_is_the_whole_video_in_half_precision(dtype):
    vae, latents = small_vae(dtype=dtype, num_res_blocks=1), random_latents(4)
    assert torch.equal(stream(StreamingDecoder(vae).open(), latents, [3, 1]), whole(vae, latents))


@pytest.mark.parametrize("temperal", [[True, False, True], [True, True, False]], ids=str)
def test_time_may_be_halved_elsewhere(temperal):
    vae, latents = small_vae(num_res_blocks=1, temperal_downsample=temperal), random_latents(4)
    assert torch.equal(stream(StreamingDecoder(vae).open(), latents, [3, 1]), whole(vae, latents))


def test_a_first_chunk_has_nine_frames_and_a_later_one_twelve(vae):
    state, latents = StreamingDecoder(vae).open(), random_latents(6)
    first, second = state.decode(latents[:3]), state.decode(latents[3:])
    assert (first.dtype, tuple(first.shape)) == (torch.uint8, (9, 8 * HEIGHT, 8 * WIDTH, 3))
    assert (tuple(second.shape), state.latent_frames) == ((12, 8 * HEIGHT, 8 * WIDTH, 3), 6)
    assert StreamingDecoder(vae).open().decode(latents[:1]).shape[0] == 1


def test_sessions_do_not_meet(vae):
    decoder = StreamingDecoder(vae)
    videos = [random_latents(5, seed, size) for seed, size in ((1, (3, 5)), (2, (3, 5)), (3, (4, 4)))]
    states = [decoder.open() for _ in videos]
    frames = [[] for _ in videos]
    for chunk in (slice(0, 1), slice(1, 3), slice(3, 5)):
        for state, latents, made in zip(states, videos, frames, strict=True):
            made.append(state.decode_float(latents[chunk]))
            vae.decode(denormalised(vae, latents[:1]).transpose(0, 1).unsqueeze(0))  # nor does the VAE's own state
    for latents, made in zip(videos, frames, strict=True):
        assert torch.equal(torch.cat(made), whole(vae, latents))


def test_latents_of_any_floating_type_are_taken(vae):
    latents = random_latents(2).to(torch.bfloat16)
    assert torch.equal(StreamingDecoder(vae).open().decode_float(latents), whole(vae, latents.float()))


def test_the_decoder_holds_no_second_copy_of_the_weights(vae):
    decoder = StreamingDecoder(vae)
    own = {parameter.data_ptr() for parameter in vae.parameters()}
    for step in (decoder.first, decoder.next):
        assert {parameter.data_ptr() for parameter in step.parameters()} <= own
    assert any(isinstance(module, torch.nn.Upsample) for module in vae.decoder.modules())


def test_a_cache_that_is_not_carried_shows(vae):
    latents = random_latents(6)
    decoder = StreamingDecoder(vae)
    wanted = whole(vae, latents)
    apart = torch.cat([decoder.open().decode_float(chunk) for chunk in latents.split(3)])
    assert apart.shape != wanted.shape
    state = decoder.open()
    state.decode_float(latents[:3])
    for index in range(len(state._cache)):
        kept = state._cache[index]
        state._cache[index] = torch.zeros_like(kept)
        snapshot = state.snapshot()
        got = state.decode_float(latents[3:4])
        assert (got - wanted[9:13]).abs().max() > 1e-4, cache_name(index)
        state.restore(snapshot)
        state._cache[index] = kept


def test_zeros_for_the_time_convolutions_on_the_first_frame_show(vae):
    """The variant of Self-Forcing's demo: all caches zero, the time convolutions run on frame 0, three frames dropped."""
    latents = random_latents(1)
    slots = cache_slots(VaeConfig.from_mapping(vae.config), latent_height=HEIGHT, latent_width=WIDTH)
    cache = [torch.zeros(slot.shape) for slot in slots]
    with torch.no_grad():
        signal = vae.post_quant_conv(denormalised(vae, latents).transpose(0, 1).unsqueeze(0))
        frames = vae.decoder(signal, feat_cache=cache, feat_idx=[0]).clamp(-1, 1)[0].transpose(0, 1)
    assert frames.shape[0] == 4
    assert (frames[3:] - whole(vae, latents)).abs().max() > 0.05


def test_the_steps_are_pure(vae):
    """What is traced: caches in, caches out, none of them written to."""
    first, following, latents = FirstFrame(vae), NextFrame(vae), random_latents(3)
    slots = cache_slots(VaeConfig.from_mapping(vae.config), latent_height=HEIGHT, latent_width=WIDTH)
    with torch.no_grad():
        frames, filled = first(latents[:1])
        given = iter(filled)
        caches = [torch.zeros(slot.shape) if slot.skips_first else next(given) for slot in slots]
        before = [cache.clone() for cache in caches]
        made, written = following(latents[1:2], caches)
        assert all(map(torch.equal, caches, before))
        again, _ = following(latents[1:2], caches)
    assert torch.equal(made, again)
    assert torch.equal(torch.cat([frames, made], dim=2)[0].transpose(0, 1), whole(vae, latents[:2]))
    assert [tuple(cache.shape) for cache in written] == [slot.shape for slot in slots]
    assert not {cache.data_ptr() for cache in written} & {cache.data_ptr() for cache in caches}


# ---- snapshots


def test_a_snapshot_is_gone_back_to(vae, tmp_path):
    latents, decoder = random_latents(7), StreamingDecoder(vae)
    wanted, state = whole(vae, latents), decoder.open()
    assert torch.equal(state.decode_float(latents[:1]), wanted[:1])
    early = state.snapshot()
    state.decode_float(latents[1:3])
    snapshot = state.snapshot()
    for _ in range(2):
        assert torch.equal(state.decode_float(latents[3:]), wanted[9:])
        state.restore(snapshot)
    assert state.latent_frames == 3
    save_file(snapshot, tmp_path / "state.safetensors")
    other = decoder.open()
    other.restore(load_file(tmp_path / "state.safetensors"))
    assert torch.equal(other.decode_float(latents[3:]), wanted[9:])
    other.restore(early)
    assert torch.equal(other.decode_float(latents[1:]), wanted[1:])


def test_a_snapshot_of_the_start(vae):
    decoder, latents = StreamingDecoder(vae), random_latents(2)
    state = decoder.open()
    start = state.snapshot()
    assert start.keys() == {"latent_frames"}
    state.decode(random_latents(2, size=(2, 4)))
    state.restore(start)
    assert torch.equal(state.decode_float(latents), whole(vae, latents))


def test_a_snapshot_has_the_predicted_bytes(vae):
    state = StreamingDecoder(vae).open()
    config = VaeConfig.from_mapping(vae.config)
    slots = cache_slots(config, latent_height=HEIGHT, latent_width=WIDTH)
    predicted = cache_bytes(config, latent_height=HEIGHT, latent_width=WIDTH, dtype=torch.float32)
    for latents in random_latents(3).split(1):
        state.decode(latents)
        snapshot = state.snapshot()
        assert snapshot.pop("latent_frames").item() == state.latent_frames
        assert [tuple(cache.shape) for cache in snapshot.values()] == [slot.shape for slot in slots]
        assert sum(cache.nbytes for cache in snapshot.values()) == predicted
        zero = [bool((cache == 0).all()) for cache in snapshot.values()]
        assert zero == [slot.skips_first and state.latent_frames == 1 for slot in slots]


def test_a_snapshot_of_something_else_is_refused(vae):
    decoder, latents = StreamingDecoder(vae), random_latents(4)
    state = decoder.open()
    state.decode(latents[:3])
    good = state.snapshot()
    last = cache_name(len(good) - 2)
    bad = [
        {},
        {"latent_frames": torch.tensor([-1])},
        {"latent_frames": torch.tensor([0.0])},
        {"latent_frames": torch.tensor([3])},
        good | {"latent_frames": torch.tensor([0])},
        good | {"more": torch.zeros(1)},
        {name: tensor for name, tensor in good.items() if name != last},
        good | {last: good[last][:, :, :1]},
        good | {last: good[last].to(torch.bfloat16)},
        good | {cache_name(0): torch.zeros(3)},
    ]
    for snapshot in bad:
        with pytest.raises(RequestError, match="snapshot is not of this VAE"):
            state.restore(snapshot)
    assert torch.equal(state.decode_float(latents[3:]), whole(vae, latents)[9:])
    other = StreamingDecoder(small_vae(num_res_blocks=1)).open()
    with pytest.raises(RequestError, match="snapshot"):
        other.restore(good)


# ---- pixels, and what is refused


def test_pixels_are_rounded_and_clamped():
    signal = torch.tensor([-1.0, 1.0, -1.5, 7.0, 0.0, 100 / 127.5 - 1, 100.4 / 127.5 - 1, 100.6 / 127.5 - 1])
    frames = signal.view(8, 1, 1, 1).expand(8, 3, 1, 2)
    pixels = pixels_from_signal(frames)
    assert pixels[:, 0, 0, 0].tolist() == [0, 255, 0, 255, 128, 100, 100, 101]
    assert (pixels.dtype, tuple(pixels.shape), pixels.is_contiguous()) == (torch.uint8, (8, 1, 2, 3), True)
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(pixels_from_signal((every / 127.5 - 1).view(-1, 1, 1, 1))[:, 0, 0, 0], every)


def test_frames_are_the_pixels_of_the_signal(vae):
    latents, decoder = random_latents(4), StreamingDecoder(vae)
    signal = stream(decoder.open(), latents, [3, 1])
    state = decoder.open()
    frames = torch.cat([state.decode(chunk) for chunk in latents.split([3, 1])])
    assert torch.equal(frames, pixels_from_signal(signal))
    assert frames.float().std() > 10


@pytest.mark.parametrize(
    "spoil",
    [
        lambda latents: latents[0],
        lambda latents: latents.unsqueeze(0),
        lambda latents: latents[:, :8],
        lambda latents: latents[:0],
        lambda latents: latents.to(torch.int32),
        lambda latents: latents[..., 1:],
        lambda latents: latents.transpose(2, 3),
        lambda latents: torch.full_like(latents, float("nan")),
        lambda latents: latents.index_fill(0, torch.tensor([1]), float("inf")),
    ],
)
def test_wrong_latents_are_refused_and_change_nothing(vae, spoil):
    state, latents = StreamingDecoder(vae).open(), random_latents(3)
    state.decode(latents[:1])
    with pytest.raises(RequestError, match=r"latents to decode must be (floating \[F, 16, 3, 5\], got|finite)"):
        state.decode(spoil(latents[1:]))
    assert torch.equal(state.decode_float(latents[1:]), whole(vae, latents)[1:])


def test_a_state_that_broke_half_way_says_so(vae, monkeypatch):
    decoder, latents = StreamingDecoder(vae), random_latents(3)
    state = decoder.open()
    state.decode(latents[:1])
    snapshot = state.snapshot()
    with monkeypatch.context() as patched:

        def fail(*arguments, **settings):
            raise MemoryError

        patched.setattr(decoder.next, "decode", fail)
        with pytest.raises(MemoryError):
            state.decode(latents[1:])
    for call in (lambda: state.decode(latents[1:]), state.snapshot):
        with pytest.raises(RequestError, match="broke down half way; restore a snapshot"):
            call()
    state.restore(snapshot)
    assert torch.equal(state.decode_float(latents[1:]), whole(vae, latents)[1:])


# ---- TF32


@pytest.fixture(params=["tf32", "ieee"])
def precision(request):
    """What convolutions of this process compute in before and after the VAE is used, as cuDNN would on a GPU."""
    convolutions = torch.backends.cudnn.conv
    before, convolutions.fp32_precision = convolutions.fp32_precision, request.param
    yield request.param
    convolutions.fp32_precision = before


@pytest.mark.filterwarnings("error")
def test_convolutions_are_exact_and_the_process_keeps_its_precision(vae, precision):
    seen = []

    def look(module, inputs):
        if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d):
            seen.append(torch.backends.cudnn.conv.fp32_precision)

    state = StreamingDecoder(vae).open()
    between = []
    with torch.nn.modules.module.register_module_forward_pre_hook(look):
        for latent in random_latents(2).split(1):
            state.decode_float(latent)
            between.append(torch.backends.cudnn.conv.fp32_precision)
        decoding = len(seen)
        encode(vae, torch.zeros(5, 8 * HEIGHT, 8 * WIDTH, 3, dtype=torch.uint8))
    assert set(seen) == {"ieee"}
    assert 0 < decoding < len(seen)
    assert between == [precision] * 2
    assert torch.backends.cudnn.conv.fp32_precision == precision


def test_precision_is_given_back_when_decoding_fails(vae, precision, monkeypatch):
    decoder = StreamingDecoder(vae)

    def fail(latent):
        raise MemoryError

    monkeypatch.setattr(decoder.first, "forward", fail)
    with pytest.raises(MemoryError):
        decoder.open().decode(random_latents(1))
    assert torch.backends.cudnn.conv.fp32_precision == precision


# ---- memory


def fake_caches(config, height, width):
    """What diffusers' decoder leaves in its caches after two latents, without memory."""
    with FakeTensorMode(), torch.device("cpu"), torch.no_grad():
        decoder = diffusers.AutoencoderKLWan(**config.to_mapping()).eval().decoder
        cache = [None] * sum(isinstance(module, torch.nn.Conv3d) for module in decoder.modules())
        for _ in range(2):
            decoder(torch.empty(1, config.z_dim, 1, height, width), feat_cache=cache, feat_idx=[0])
    return [tuple(entry.shape) for entry in cache if isinstance(entry, torch.Tensor)]


@pytest.mark.parametrize(
    ("config", "height", "width"),
    [
        (VaeConfig(), 60, 104),
        (VaeConfig(), 90, 160),
        (VaeConfig(base_dim=6, decoder_base_dim=10, num_res_blocks=1), 3, 5),
        (VaeConfig(base_dim=8, dim_mult=(1, 3, 5, 2), temperal_downsample=(True, False, True)), 4, 2),
        (VaeConfig(base_dim=8, temperal_downsample=(True, True, False), num_res_blocks=3), 1, 1),
    ],
    ids=["480p", "720p", "narrow", "odd", "early"],
)
def test_caches_are_predicted_exactly(config, height, width):
    slots = cache_slots(config, latent_height=height, latent_width=width)
    shapes = fake_caches(config, height, width)
    assert [slot.shape for slot in slots] == shapes
    assert {shape[2] for shape in shapes} == {CACHED_FRAMES}
    assert sum(slot.skips_first for slot in slots) == 2


def test_the_caches_of_wan_at_480p():
    sizes = {"latent_height": 60, "latent_width": 104}
    assert cache_bytes(VaeConfig(), **sizes, dtype=torch.bfloat16) == 2 * 944_286_720
    assert cache_bytes(VaeConfig(), **sizes, dtype=torch.bfloat16) >> 20 == 1801
    assert cache_bytes(VaeConfig(), **sizes, dtype=torch.float32) >> 20 == 3602


# ---- encoding


def random_frames(num, height=16, width=24):
    generator = torch.Generator().manual_seed(num)
    return torch.randint(256, (num, height, width, 3), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("num_frames", [1, 5, 13])
def test_latents_are_the_normalised_mode(vae, num_frames):
    frames = random_frames(num_frames)
    signal = frames.permute(3, 0, 1, 2).unsqueeze(0) / 127.5 - 1
    with torch.no_grad():
        mode = vae.encode(signal).latent_dist.mode()[0].transpose(0, 1)
    latents = encode(vae, frames)
    assert (latents.dtype, tuple(latents.shape)) == (torch.float32, (1 + num_frames // 4, 16, 2, 3))
    torch.testing.assert_close(denormalised(vae, latents), mode, rtol=0, atol=ROUNDED)
    assert torch.equal(latents, encode(vae, frames.permute(0, 3, 1, 2) / 127.5 - 1))
    assert StreamingDecoder(vae).open().decode(latents).shape == frames.shape


def test_a_later_frame_does_not_change_an_earlier_latent(vae):
    frames = random_frames(9)
    assert torch.equal(encode(vae, frames)[:2], encode(vae, frames[:5]))


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (random_frames(4), "1 \\+ 4k frames .*got 4"),
        (random_frames(5)[:0], "1 \\+ 4k frames .*got 0"),
        (random_frames(1, 12, 24), "multiples of 8 pixels, got 12x24"),
        (random_frames(1)[:, :0], "multiples of 8 pixels"),
        (random_frames(1)[0], "uint8"),
        (random_frames(1).permute(0, 3, 1, 2), "uint8"),
        (random_frames(1).to(torch.int64), "got torch.int64"),
        (torch.zeros(1, 16, 16, 3), "floating"),
        (torch.full((1, 3, 16, 16), 1.5), "must lie in"),
        (torch.full((1, 3, 16, 16), float("nan")), "must lie in"),
    ],
)
def test_wrong_frames_are_refused(vae, frames, message):
    with pytest.raises(RequestError, match=message):
        encode(vae, frames)


def test_files_are_found_in_the_order_that_is_told(vae, tmp_path):
    folder = write_wan(vae, write_diffusers(vae, tmp_path / "both"))
    assert vae_checkpoint.find_vae_files(folder).layout == "diffusers"
    assert vae_checkpoint.find_vae_files(folder / WAN_FILE).layout == "wan"
