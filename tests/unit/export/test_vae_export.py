"""The VAE's two graphs: one copy of the weights, ONNX Runtime against diffusers' whole decode, engines of tensorrt_rtx."""

from importlib.util import find_spec

import onnx
import pytest
import torch
from onnx import external_data_helper
from support.tolerances import MODULE

from causalrt.engines.bundle import FIRST_GRAPH, NEXT_GRAPH, VAE_WEIGHTS
from causalrt.engines.tensorrt_flavour import FLAVOURS
from causalrt.engines.vae import FRAMES, LATENT, MADE
from causalrt.engines.vae_onnx import OnnxVae
from causalrt.errors import BuildError, BundleError, ExecutorError, RequestError
from causalrt.export.engine_worker import build_engine
from causalrt.export.vae import vae_engine_requests, write_vae, write_vae_weights
from causalrt.model.codecs.decode_state import cache_name
from causalrt.model.codecs.registry import load_vae
from causalrt.model.codecs.vae_checkpoint import VaeConfig
from causalrt.model.codecs.wan_vae import StreamingDecoder, cache_slots

diffusers = pytest.importorskip("diffusers", reason="the VAE is diffusers': pip install '.[video]'")

HEIGHT, WIDTH = 3, 5
GRAPHS = (FIRST_GRAPH, NEXT_GRAPH)
needs_rtx = pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None,
    reason="engines are built with tensorrt_rtx: pip install '.[tensorrt-rtx]'",
)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Small convolutions on several threads wait for each other, at great length where the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Written:
    """A small random VAE, and the folder that its graphs were written into."""

    def __init__(self, folder, *, dtype=torch.float32, num_res_blocks=1, **config):
        torch.manual_seed(0)
        self.vae = diffusers.AutoencoderKLWan(base_dim=8, num_res_blocks=num_res_blocks, **config)
        state = {
            name: (tensor + 0.2 * torch.randn_like(tensor) * ("gamma" in name)).to(dtype)  # no two tensors are equal
            for name, tensor in self.vae.state_dict().items()
        }
        self.vae.load_state_dict(state, assign=True)
        self.vae.requires_grad_(False).eval()
        self.folder, self.progress = folder, []
        self.config = VaeConfig.from_mapping(self.vae.config)
        self.slots = cache_slots(self.config, latent_height=HEIGHT, latent_width=WIDTH)
        write_vae(self.vae, folder, lambda *told: self.progress.append(told), latent_height=HEIGHT, latent_width=WIDTH)

    def graph(self, name):
        return onnx.load(self.folder / name, load_external_data=False)

    def whole(self, latents):
        mean, std = (torch.tensor(self.vae.config[f"latents_{name}"]).view(1, -1, 1, 1) for name in ("mean", "std"))
        with torch.no_grad():
            return self.vae.decode((latents * std + mean).transpose(0, 1).unsqueeze(0)).sample[0].transpose(0, 1)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return Written(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def onnx_vae(written):
    return OnnxVae(written.folder)


def random_latents(num, seed=1):
    return torch.randn(num, 16, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(seed))


def assert_close(got, wanted):
    assert got.shape == wanted.shape
    wrong = (got - wanted).abs()
    worst = int(wrong.argmax())
    assert wrong.max() <= MODULE, (worst, got.flatten()[worst], wanted.flatten()[worst], wrong.max())


# ---- what is written


def test_the_graphs_say_what_goes_in_and_out(written):
    names = [cache_name(index) for index in range(len(written.slots))]
    filled = [name for name, slot in zip(names, written.slots, strict=True) if not slot.skips_first]
    assert len(names) - len(filled) == 2
    wanted = {FIRST_GRAPH: ([LATENT], filled, 1), NEXT_GRAPH: ([LATENT, *names], names, 4)}
    shapes = {name: list(slot.shape) for name, slot in zip(names, written.slots, strict=True)}
    shapes |= {name + MADE: shape for name, shape in shapes.items()} | {LATENT: [1, 16, HEIGHT, WIDTH]}
    for file, (inputs, caches, num_frames) in wanted.items():
        model = written.graph(file)
        graph = model.graph
        assert [value.name for value in graph.input] == inputs
        assert [value.name for value in graph.output] == [FRAMES, *(cache + MADE for cache in caches)]
        shapes[FRAMES] = [1, 3, num_frames, 8 * HEIGHT, 8 * WIDTH]
        for value in (*graph.input, *graph.output):
            assert [size.dim_value for size in value.type.tensor_type.shape.dim] == shapes[value.name]
        assert {entry.domain: entry.version for entry in model.opset_import}[""] == 24
    assert [done for _, done, _ in written.progress] == [0, 1, 2, 3]
    assert {path.name for path in written.folder.iterdir()} >= {*GRAPHS, VAE_WEIGHTS}


def test_weights_are_stored_once(written):
    decoding = {name for name in written.vae.state_dict() if name.startswith(("decoder.", "post_quant_conv."))}
    for file in GRAPHS:
        held = set()
        for tensor in written.graph(file).graph.initializer:
            if external_data_helper.uses_external_data(tensor):
                assert {entry.key: entry.value for entry in tensor.external_data}["location"] == VAE_WEIGHTS
                held.add(tensor.name.removeprefix("wan."))
            else:
                assert len(tensor.raw_data) <= 80, tensor.name  # paddings of five dimensions
        timed = {name for name in decoding if ".time_conv." in name}
        assert held == (decoding - timed if file == FIRST_GRAPH else decoding)


def test_graphs_do_not_tell_where_they_were_made(written):
    for file in GRAPHS:
        assert b".py" not in (written.folder / file).read_bytes()


def test_the_bundle_s_vae_loads_again(written):
    loaded = load_vae(written.folder / VAE_WEIGHTS)
    assert VaeConfig.from_mapping(loaded.config) == written.config
    wanted = written.vae.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in loaded.state_dict().items())


def test_weights_that_cannot_be_written(written, tmp_path):
    with pytest.raises(BuildError, match=r"cannot write the VAE's weights \(.* MiB\) to .*nowhere"):
        write_vae_weights(written.vae, tmp_path / "nowhere" / VAE_WEIGHTS)
    (tmp_path / VAE_WEIGHTS).mkdir()
    with pytest.raises(BuildError, match="cannot write"):
        write_vae_weights(written.vae, tmp_path / VAE_WEIGHTS)
    assert [path.name for path in tmp_path.iterdir()] == [VAE_WEIGHTS]
    assert (
        len({(written.folder / file).stat().st_mode for file in (*GRAPHS, VAE_WEIGHTS)}) == 1
    )  # safetensors writes 0600


def test_attention_is_spelled_out(written):
    for file in GRAPHS:
        kinds = [node.op_type for node in written.graph(file).graph.node]
        assert (kinds.count("Attention"), kinds.count("Softmax"), kinds.count("Resize")) == (0, 1, 3)
        assert "GatherND" not in kinds


# ---- ONNX Runtime


@pytest.mark.parametrize("pattern", [[3, 3, 3], [1, 3, 3], [3, 6]], ids=str)
def test_a_stream_is_the_whole_video(written, onnx_vae, pattern):
    latents, state = random_latents(sum(pattern)), onnx_vae.open()
    got = torch.cat([state.decode_float(chunk) for chunk in latents.split(pattern)])
    assert_close(got, written.whole(latents))
    assert state.latent_frames == sum(pattern)


def test_frames_are_pixels_like_those_of_eager(written, onnx_vae):
    latents, state, eager = random_latents(6), onnx_vae.open(), StreamingDecoder(written.vae).open()
    for chunk in latents.split(3):
        got, wanted = state.decode(chunk), eager.decode(chunk)
        assert (got.dtype, got.shape) == (torch.uint8, wanted.shape)
        assert (got.int() - wanted.int()).abs().max() <= 1
        assert (got != wanted).float().mean() < 1e-3


def test_sessions_do_not_meet(written, onnx_vae):
    videos = [random_latents(5, seed) for seed in (1, 2)]
    states = [onnx_vae.open() for _ in videos]
    frames = [[], []]
    for chunk in (slice(0, 2), slice(2, 3), slice(3, 5)):
        for state, latents, made in zip(states, videos, frames, strict=True):
            made.append(state.decode_float(latents[chunk]))
    for latents, made in zip(videos, frames, strict=True):
        assert_close(torch.cat(made), written.whole(latents))


def test_memory_is_taken_and_bound_once(onnx_vae):
    state = onnx_vae.open()

    def memory():
        tensors = [state._latent, *state._frames, *state._sets[0], *state._sets[1]]
        return [tensor.data_ptr() for tensor in tensors], [id(run) for run in (state._first, *state._next)]

    before = memory()
    for chunk in random_latents(5).split([1, 2, 2]):
        current = state._current
        state.decode(chunk)
        assert state._current == (0 if state.latent_frames == 1 else (current + len(chunk)) % 2)
    assert memory() == before
    assert len(set(before[0])) == len(before[0])


def test_snapshots_go_to_eager_and_back(written, onnx_vae):
    latents = random_latents(6)
    wanted = written.whole(latents)
    state, eager = onnx_vae.open(), StreamingDecoder(written.vae).open()
    state.decode(latents[:2])
    snapshot = state.snapshot()
    state.decode(latents[2:5])
    eager.restore(snapshot)
    assert_close(eager.decode_float(latents[2:4]), wanted[5:13])
    for _ in range(2):
        state.restore(eager.snapshot())
        assert_close(state.decode_float(latents[4:]), wanted[13:])
    state.restore(snapshot)  # which nothing has written to
    assert_close(state.decode_float(latents[2:]), wanted[5:])


def test_the_start_is_gone_back_to(written, onnx_vae):
    latents, state = random_latents(3), onnx_vae.open()
    start = state.snapshot()
    for num in (3, 2):
        state.decode(random_latents(num, seed=7))
        state.restore(start)
        assert_close(state.decode_float(latents), written.whole(latents))
        state.restore(start)


def test_the_zeros_of_the_time_convolutions_matter(written, onnx_vae):
    latents, state = random_latents(2), onnx_vae.open()
    skipped = [index for index, slot in enumerate(written.slots) if slot.skips_first]
    state._sets[0][skipped[0]].fill_(1.0)
    got = state.decode_float(latents)
    assert (got - written.whole(latents)).abs().max() > 100 * MODULE


def test_wrong_latents_are_refused_and_change_nothing(written, onnx_vae):
    latents, state = random_latents(3), onnx_vae.open()
    state.decode(latents[:1])
    for wrong in (latents[:, :, 1:], torch.zeros(1, 16, 4, 4), latents.int(), torch.full_like(latents, float("nan"))):
        with pytest.raises(RequestError, match="latents to decode must be"):
            state.decode(wrong)
    assert_close(state.decode_float(latents[1:]), written.whole(latents)[1:])


def test_another_size_s_snapshot_is_refused(written, onnx_vae):
    eager = StreamingDecoder(written.vae).open()
    eager.decode(torch.zeros(1, 16, 2, 2))
    with pytest.raises(RequestError, match="snapshot is not of this VAE at this size"):
        onnx_vae.open().restore(eager.snapshot())


def test_a_bundle_without_a_vae_is_refused(written, tmp_path):
    with pytest.raises(BundleError, match=r"lacks vae-first.onnx, vae-next.onnx, vae.safetensors; build the bundle"):
        OnnxVae(tmp_path)
    for file in (*GRAPHS, VAE_WEIGHTS):
        (tmp_path / file).write_bytes(b"")
    with pytest.raises(ExecutorError, match=r"onnxruntime .* cannot run vae-first.onnx on cpu"):
        OnnxVae(tmp_path)


# ---- TensorRT


def build(written, target, dtype):
    for request in vae_engine_requests(f"tensorrt_rtx-{target}"):
        network = build_engine(FLAVOURS["tensorrt_rtx"], target, request, written.folder, None)
        graph = written.graph(request.onnx).graph
        for kind, values in (("inputs", graph.input), ("outputs", graph.output)):
            assert [entry["name"] for entry in network[kind]] == [value.name for value in values]
            dtypes = {entry["dtype"] for entry in network[kind] if entry["name"] != LATENT}
            assert dtypes <= {dtype}
        assert (network["attentions"], network["layers"]["SOFTMAX"]) == ([], 1)
        assert network["layers"]["CONVOLUTION"] == sum(node.op_type == "Conv" for node in graph.node)
        assert (written.folder / request.engine).stat().st_size > 1000
    assert request.engine == f"tensorrt_rtx-{target}-vae-next.engine"


@needs_rtx
def test_engines_are_built_without_a_gpu(written):
    build(written, "sm80", "FLOAT")


@needs_rtx
@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "BF16"), (torch.float16, "HALF")], ids=str)
def test_engines_in_half_precision(tmp_path, dtype, name):
    written = Written(tmp_path, dtype=dtype, num_res_blocks=2)
    for target in ("sm80", "sm89", "sm120"):
        build(written, target, name)


@pytest.mark.slow
@pytest.mark.parametrize("temperal", [[True, False, True], [True, True, False]], ids=str)
def test_time_may_be_halved_elsewhere(tmp_path, temperal):
    written = Written(tmp_path, num_res_blocks=2, temperal_downsample=temperal, decoder_base_dim=12)
    latents, state = random_latents(4), OnnxVae(tmp_path, num_threads=2).open()
    got = torch.cat([state.decode_float(chunk) for chunk in latents.split([3, 1])])
    assert_close(got, written.whole(latents))
