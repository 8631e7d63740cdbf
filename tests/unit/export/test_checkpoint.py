import json
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from causalrt.config import ModelConfig
from causalrt.engines.bundle import tensor_digest
from causalrt.errors import BuildError, CheckpointError
from causalrt.export.checkpoint import (
    DIGESTS,
    check_checkpoint,
    infer_sizes,
    model_shapes,
    open_checkpoint,
    write_weights,
)
from causalrt.export.random_weights import random_weights
from causalrt.recipes import recipe

MODEL = recipe("tiny").model


@pytest.fixture
def weights():
    return dict(random_weights(MODEL, seed=3))


def diffusers_model(model: ModelConfig):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(5)
    return diffusers.WanTransformer3DModel(
        patch_size=(1, model.patch_height, model.patch_width),
        num_attention_heads=model.num_heads,
        attention_head_dim=model.head_dim,
        in_channels=model.latent_channels,
        out_channels=model.latent_channels,
        text_dim=model.text_dim,
        freq_dim=model.freq_dim,
        ffn_dim=model.ffn_dim,
        num_layers=model.num_layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    )


def assert_holds(checkpoint, weights):
    assert set(checkpoint.shapes) == set(weights)
    for name, expected in weights.items():
        assert checkpoint.shapes[name] == tuple(expected.shape)
        assert checkpoint.dtypes[name] == expected.dtype
        torch.testing.assert_close(checkpoint.tensor(name), expected, rtol=0, atol=0, msg=name)
        checkpoint.release(name)
        assert torch.equal(checkpoint.tensor(name), expected), f"{name} changed by release"


def shard(weights, folder, stem="diffusion_pytorch_model", num_shards=3):
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(weights)
    weight_map = {}
    for i in range(num_shards):
        file = f"{stem}-{i + 1:05}-of-{num_shards:05}.safetensors"
        save_file({name: weights[name] for name in names[i::num_shards]}, folder / file)
        weight_map |= dict.fromkeys(names[i::num_shards], file)
    index = folder / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


# ---- layouts


def wrap_fsdp(weights):
    return {
        f"_fsdp_wrapped_module.model.{name}".replace("blocks.0.", "blocks.0._fsdp_wrapped_module._orig_mod.").replace(
            ".ffn.", "._checkpoint_wrapped_module.ffn."
        ): tensor
        for name, tensor in weights.items()
    }


@pytest.mark.parametrize(
    ("wrap", "layout"),
    [
        (lambda w: {"generator_ema": {f"model.{n}": t for n, t in w.items()}}, "self_forcing"),
        (lambda w: {"generator": {f"model.{n}": t for n, t in w.items()}, "step": 3}, "self_forcing"),
        (lambda w: {"generator_ema": w, "generator": {n: t + 1 for n, t in w.items()}}, "self_forcing"),
        (lambda w: {"generator_ema": wrap_fsdp(w)}, "self_forcing"),
        (lambda w: {f"_orig_mod.model.{n}": t for n, t in w.items()}, "self_forcing"),
        (lambda w: {f"_orig_mod.{n}": t for n, t in w.items()}, "wan"),
        (lambda w: {n: torch.nn.Parameter(t) for n, t in w.items()}, "wan"),
        (lambda w: w, "wan"),
    ],
    ids=["ema", "generator", "ema-preferred", "fsdp", "bare-prefixed", "compiled", "parameters", "bare"],
)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_torch_files(tmp_path, weights, wrap, layout, zipped, caplog):
    path = tmp_path / "model.pt"
    torch.save(wrap(weights), path, _use_new_zipfile_serialization=zipped)
    checkpoint = open_checkpoint(path)
    assert checkpoint.layout == layout
    assert_holds(checkpoint, weights)
    check_checkpoint(checkpoint, MODEL)
    assert ("legacy torch file" in caplog.text) is not zipped


def test_safetensors_file_of_any_name(tmp_path, weights):
    for name in ("model.safetensors", "model.bin"):
        save_file(weights, tmp_path / name)
        checkpoint = open_checkpoint(tmp_path / name)
        assert checkpoint.layout == "wan"
        assert_holds(checkpoint, weights)


def test_safetensors_with_prefix_is_self_forcing(tmp_path, weights):
    save_file({f"model.{n}": t for n, t in weights.items()}, tmp_path / "x.safetensors")
    checkpoint = open_checkpoint(tmp_path / "x.safetensors")
    assert checkpoint.layout == "self_forcing"
    assert_holds(checkpoint, weights)


@pytest.mark.parametrize("subfolder", ["", "transformer"])
def test_wan_folder_single_and_sharded(tmp_path, weights, subfolder):
    single = tmp_path / "single" / subfolder
    single.mkdir(parents=True)
    save_file(weights, single / "diffusion_pytorch_model.safetensors")
    index = shard(weights, tmp_path / "sharded" / subfolder)
    for path in (tmp_path / "single", tmp_path / "sharded", index):
        checkpoint = open_checkpoint(path)
        assert checkpoint.layout == "wan"
        assert_holds(checkpoint, weights)


@pytest.mark.parametrize("subfolder", ["", "transformer"])
@pytest.mark.parametrize("max_shard_size", ["10GB", "100KB"], ids=["single", "sharded"])
def test_real_diffusers_model(tmp_path, subfolder, max_shard_size):
    model = diffusers_model(MODEL)
    model.save_pretrained(tmp_path / subfolder, max_shard_size=max_shard_size)
    assert (len(list((tmp_path / subfolder).glob("*.safetensors"))) > 1) is (max_shard_size == "100KB")

    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.layout == "diffusers"
    assert dict(checkpoint.shapes) == model_shapes(MODEL)
    check_checkpoint(checkpoint, MODEL)
    module, theirs = model, model.blocks[1]
    for name, parameter in {
        "patch_embedding.weight": module.patch_embedding.weight,
        "text_embedding.2.bias": module.condition_embedder.text_embedder.linear_2.bias,
        "time_embedding.0.weight": module.condition_embedder.time_embedder.linear_1.weight,
        "time_projection.1.weight": module.condition_embedder.time_proj.weight,
        "blocks.1.modulation": theirs.scale_shift_table,
        "blocks.1.self_attn.q.weight": theirs.attn1.to_q.weight,
        "blocks.1.self_attn.o.bias": theirs.attn1.to_out[0].bias,
        "blocks.1.self_attn.norm_k.weight": theirs.attn1.norm_k.weight,
        "blocks.1.cross_attn.v.weight": theirs.attn2.to_v.weight,
        "blocks.1.norm3.weight": theirs.norm2.weight,
        "blocks.1.ffn.0.weight": theirs.ffn.net[0].proj.weight,
        "blocks.1.ffn.2.weight": theirs.ffn.net[2].weight,
        "head.modulation": module.scale_shift_table,
        "head.head.weight": module.proj_out.weight,
    }.items():
        assert torch.equal(checkpoint.tensor(name), parameter), name


def test_every_diffusers_tensor_has_one_reference_name(tmp_path):
    """Values that identify the tensor survive the renaming, so no two of one shape are swapped by accident."""
    state = diffusers_model(MODEL).state_dict()
    named = {key: torch.full_like(tensor, i) for i, (key, tensor) in enumerate(sorted(state.items()))}
    torch.save(named, tmp_path / "d.pt")
    checkpoint = open_checkpoint(tmp_path / "d.pt")
    assert checkpoint.layout == "diffusers"
    seen = {name: int(checkpoint.tensor(name).unique()) for name in checkpoint.shapes}
    assert sorted(seen.values()) == list(range(len(named)))
    keys = sorted(named)
    for name, i in seen.items():
        theirs, ours = keys[i].split("."), name.split(".")
        if ours[0] == "blocks":
            assert theirs[:2] == ours[:2], (name, keys[i])
        assert ours[-1] == theirs[-1] or (ours[-1], theirs[-1]) == ("modulation", "scale_shift_table")


def test_keys_that_collapse_are_refused(tmp_path, weights):
    torch.save(weights | {"model._orig_mod.head.head.bias": weights["head.head.bias"]}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"'head\.head\.bias' and 'model\._orig_mod\.head\.head\.bias' are both"):
        open_checkpoint(tmp_path / "x.pt")


def test_views_of_one_storage_are_released_apart(tmp_path, weights):
    """A flat FSDP-like buffer: dropping the pages of one tensor must not touch the values of its neighbours."""
    flat = torch.cat([tensor.flatten() for tensor in weights.values()])
    views = dict(
        zip(
            weights,
            (
                p.view(w.shape)
                for p, w in zip(flat.split([w.numel() for w in weights.values()]), weights.values(), strict=True)
            ),
            strict=True,
        )
    )
    views["text_embedding.2.weight"] = views["text_embedding.2.weight"].t()
    torch.save(views, tmp_path / "x.pt")
    assert_holds(open_checkpoint(tmp_path / "x.pt"), views)
    write_weights(open_checkpoint(tmp_path / "x.pt"), MODEL, dtype=torch.float32, out=tmp_path / "o.safetensors")
    written = load_file(tmp_path / "o.safetensors")
    assert torch.equal(written["text_embedding.2.weight"], weights["text_embedding.2.weight"].t())


# ---- hostile and damaged input


class Payload:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (os.system, (f"touch {self.marker}",))


@pytest.mark.parametrize("how", ["zip", "legacy", "plain-pickle", "protocol-4"])
def test_code_is_not_executed(tmp_path, weights, how):
    path, marker = tmp_path / "evil.pt", tmp_path / "executed"
    evil = {"generator_ema": {**weights, "x": Payload(marker)}}
    if how in ("zip", "legacy"):
        torch.save(evil, path, _use_new_zipfile_serialization=how == "zip")
    else:
        path.write_bytes(pickle.dumps(Payload(marker), protocol=2 if how == "plain-pickle" else 4))
    says = "not a checkpoint; nothing in it was executed" if how == "protocol-4" else r"holds code \(posix\.system\)"
    with pytest.raises(CheckpointError, match=says) as error:
        open_checkpoint(path)
    assert "executed" in str(error.value)
    assert not marker.exists()


@pytest.mark.parametrize("kept", [0, 3, 100, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["zip.pt", "legacy.pt", "plain.safetensors"])
def test_truncated_file(tmp_path, weights, kind, kept):
    path = tmp_path / kind
    if kind.endswith(".safetensors"):
        save_file(weights, path)
    else:
        torch.save({"generator_ema": weights}, path, _use_new_zipfile_serialization=kind == "zip.pt")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    with pytest.raises(CheckpointError, match="damaged or not a") as error:
        open_checkpoint(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"hello, this is text and no checkpoint", "damaged or not a checkpoint"),
        (b"PK\x03\x04" + bytes(500), "damaged or not a checkpoint"),
        ((1 << 60).to_bytes(8, "little") + b'{"a":1}', "damaged or not a safetensors"),
    ],
)
def test_not_a_checkpoint(tmp_path, content, says):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=says):
        open_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("saved", "says"),
    [
        ([torch.ones(2)], "got list"),
        ({}, "got dict"),
        ({"critic": {"a": torch.ones(2)}, "step": 3}, "'critic', 'step'"),
        ({"generator_ema": torch.ones(2)}, "got Tensor"),
        ({"a": torch.ones(2).to_sparse(), 7: torch.ones(1), "b": torch.ones(2, device="meta")}, "'a', 'b', 7"),
    ],
)
def test_not_a_state_dict(tmp_path, saved, says):
    torch.save(saved, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=says):
        open_checkpoint(tmp_path / "x.pt")


def test_missing_path_and_empty_folder(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        open_checkpoint(tmp_path / "absent.pt")
    with pytest.raises(CheckpointError, match=r"no \.safetensors"):
        open_checkpoint(tmp_path)


def test_ambiguous_folder_is_refused(tmp_path, weights):
    shard(weights, tmp_path)
    save_file(weights, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"more than one checkpoint .*index\.json, other\.safetensors"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "escape",
    [
        "../secret.safetensors",
        "/tmp/secret.safetensors",
        "a/../../secret.safetensors",
        "sub/x.safetensors",
        "..",
        "",
        "..\\secret.safetensors",
        "x\0.safetensors",
        "x.pt",
        "x.safetensors\n",
    ],
)
def test_index_cannot_leave_its_folder(tmp_path, weights, escape):
    folder = tmp_path / "model"
    index = shard(weights, folder)
    save_file(weights, tmp_path / "secret.safetensors")
    plain = json.loads(index.read_text())
    plain["weight_map"]["head.head.bias"] = escape
    index.write_text(json.dumps(plain))
    with pytest.raises(CheckpointError, match="a shard must be the plain name"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "text", ["", "[1]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[" * 100_000, "\xff"]
)
def test_damaged_index(tmp_path, text):
    (tmp_path / "m.safetensors.index.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"index\.json (is not readable JSON|must hold a weight_map)"):
        open_checkpoint(tmp_path)


def test_missing_shards_are_listed(tmp_path, weights):
    shard(weights, tmp_path)
    for i in (1, 3):
        (tmp_path / f"diffusion_pytorch_model-0000{i}-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks 2 of 3 shards: .*-00001-of-00003\S+, .*-00003-of-00003"):
        open_checkpoint(tmp_path)


def test_index_that_disagrees_with_its_shards(tmp_path, weights):
    index = shard(weights, tmp_path)
    plain = json.loads(index.read_text())
    plain["weight_map"]["ghost"] = plain["weight_map"].pop("head.head.bias")
    index.write_text(json.dumps(plain))
    with pytest.raises(CheckpointError, match=r"disagree .*ghost \(.*head\.head\.bias \("):
        open_checkpoint(tmp_path)


# ---- sizes, names and shapes


def test_model_shapes_of_the_released_model():
    shapes = model_shapes(recipe("wan_1_3b_480p").model)
    assert len(shapes) == 825
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 1_418_996_800
    assert shapes["patch_embedding.weight"] == (1536, 16, 1, 2, 2)
    assert shapes["time_projection.1.weight"] == (9216, 1536)
    assert shapes["blocks.29.ffn.2.weight"] == (1536, 8960)
    assert shapes["head.head.weight"] == (64, 1536)


def test_infer_sizes(tmp_path, weights):
    torch.save(weights, tmp_path / "x.pt")
    fields = ("dim", "num_layers", "ffn_dim", "freq_dim", "text_dim", "latent_channels", "patch_height", "patch_width")
    assert infer_sizes(open_checkpoint(tmp_path / "x.pt")) == {field: getattr(MODEL, field) for field in fields}


def test_every_wrong_size_is_listed_with_its_flag(tmp_path):
    other = ModelConfig(dim=60, num_heads=3, num_layers=3, ffn_dim=70, freq_dim=34, text_dim=26, latent_channels=5,
                        patch_height=1, patch_width=3)  # fmt: skip
    torch.save(dict(random_weights(other, seed=0)), tmp_path / "x.pt")
    checkpoint = open_checkpoint(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="other sizes") as error:
        check_checkpoint(checkpoint, MODEL)
    for field, size in infer_sizes(checkpoint).items():
        line = f"{field}: checkpoint {size}, recipe {getattr(MODEL, field)}; --set model.{field}={size}"
        assert line in str(error.value)
    check_checkpoint(checkpoint, other)


def test_missing_extra_and_misshapen_are_listed_in_one_error(tmp_path, weights):
    for name in ("patch_embedding.weight", "blocks.0.ffn.2.bias"):
        del weights[name]
    weights |= {"img_emb.proj": torch.ones(2), "blocks.1.cross_attn.k_img.weight": torch.ones(2)}
    weights["head.head.bias"] = torch.ones(3)
    weights["blocks.0.norm3.bias"] = torch.ones(MODEL.dim, dtype=torch.int32)
    torch.save(weights, tmp_path / "x.pt")
    with pytest.raises(CheckpointError) as error:
        write_weights(open_checkpoint(tmp_path / "x.pt"), MODEL, dtype=torch.float32, out=tmp_path / "o")
    assert str(error.value).splitlines()[1:] == [
        "  missing (2): blocks.0.ffn.2.bias, patch_embedding.weight",
        "  extra (2): blocks.1.cross_attn.k_img.weight, img_emb.proj",
        "  misshapen (2): blocks.0.norm3.bias (got int32 [48], wanted floating [48]), "
        "head.head.bias (got float32 [3], wanted floating [64])",
    ]
    assert os.listdir(tmp_path) == ["x.pt"]


def test_unknown_diffusers_keys_are_extra(tmp_path):
    state = diffusers_model(MODEL).state_dict() | {"blocks.0.attn2.add_k_proj.weight": torch.ones(2)}
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"extra \(1\): blocks\.0\.attn2\.add_k_proj\.weight$"):
        check_checkpoint(open_checkpoint(tmp_path / "x.pt"), MODEL)


# ---- writing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_write_weights(tmp_path, weights, dtype):
    torch.save({"generator_ema": {f"model.{n}": t for n, t in weights.items()}}, tmp_path / "x.pt")
    out, steps = tmp_path / "weights.safetensors", []
    write_weights(
        open_checkpoint(tmp_path / "x.pt"), MODEL, dtype=dtype, out=out, on_progress=lambda *step: steps.append(step)
    )
    assert steps == [(i + 1, len(weights)) for i in range(len(weights))]
    with safe_open(out, framework="pt") as file:
        metadata = file.metadata()
    written = load_file(out)
    assert json.loads(metadata[DIGESTS]) == {name: tensor_digest(tensor) for name, tensor in written.items()}
    assert set(written) == set(weights)

    expected = {name: tensor.to(dtype) for name, tensor in weights.items()}
    expected["patch_embedding.weight"] = expected["patch_embedding.weight"].reshape(MODEL.dim, MODEL.patch_features)
    for name in ("head.head.weight", "head.head.bias"):
        ours = torch.empty_like(expected[name])
        for dy in range(MODEL.patch_height):
            for dx in range(MODEL.patch_width):
                for c in range(MODEL.latent_channels):
                    theirs = (dy * MODEL.patch_width + dx) * MODEL.latent_channels + c
                    ours[(c * MODEL.patch_height + dy) * MODEL.patch_width + dx] = expected[name][theirs]
        assert not torch.equal(ours, expected[name])
        expected[name] = ours
    for name, tensor in expected.items():
        assert written[name].dtype == dtype
        assert torch.equal(written[name], tensor), name


def test_head_rows_of_an_uneven_patch(tmp_path):
    """Three different factors, so that no two axes of the permutation can stand for each other."""
    model = ModelConfig(dim=12, num_heads=1, num_layers=1, ffn_dim=8, freq_dim=4, text_dim=4, latent_channels=5,
                        patch_height=2, patch_width=3)  # fmt: skip
    weights = dict(random_weights(model, seed=0))
    weights["head.head.bias"] = torch.arange(30.0)  # (dy, dx, c) -> 15 dy + 5 dx + c
    torch.save(weights, tmp_path / "x.pt")
    write_weights(open_checkpoint(tmp_path / "x.pt"), model, dtype=torch.float32, out=tmp_path / "o.safetensors")
    bias = load_file(tmp_path / "o.safetensors")["head.head.bias"]
    assert bias.tolist() == [15 * dy + 5 * dx + c for c in range(5) for dy in range(2) for dx in range(3)]


def test_all_sources_write_the_same_bytes(tmp_path, weights):
    torch.save({"generator": wrap_fsdp(weights)}, tmp_path / "zip.pt")
    torch.save(weights, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    save_file(weights, tmp_path / "single.safetensors")
    shard(weights, tmp_path / "sharded")
    written = set()
    for source in ("zip.pt", "legacy.pt", "single.safetensors", "sharded"):
        out = tmp_path / f"{source}.out"
        write_weights(open_checkpoint(tmp_path / source), MODEL, dtype=torch.bfloat16, out=out)
        written.add(out.read_bytes())
    assert len(written) == 1


def test_values_that_are_not_finite_or_do_not_fit_are_listed(tmp_path, weights):
    weights["head.head.weight"][0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    weights["blocks.0.ffn.0.bias"][5] = float("nan")
    weights["blocks.1.modulation"][0, 0, :2] = 70_000.0
    torch.save(weights, tmp_path / "x.pt")
    out = tmp_path / "o.safetensors"
    checkpoint = open_checkpoint(tmp_path / "x.pt")
    with pytest.raises(CheckpointError) as error:
        write_weights(checkpoint, MODEL, dtype=torch.float16, out=out)
    assert str(error.value).splitlines()[1:] == [
        "  blocks.0.ffn.0.bias: 1 of 96 values not finite",
        "  blocks.1.modulation: 2 of 288 values too large for torch.float16",
        "  head.head.weight: 3 of 3072 values not finite",
    ]
    with pytest.raises(CheckpointError) as error:
        write_weights(checkpoint, MODEL, dtype=torch.bfloat16, out=out)
    assert "modulation" not in str(error.value)
    assert os.listdir(tmp_path) == ["x.pt"]


def test_failure_to_write_leaves_nothing(tmp_path, weights, monkeypatch):
    torch.save(weights, tmp_path / "x.pt")
    checkpoint = open_checkpoint(tmp_path / "x.pt")
    with pytest.raises(BuildError, match="cannot write the weights"):
        write_weights(checkpoint, MODEL, dtype=torch.float32, out=tmp_path / "absent" / "o.safetensors")

    def half_written(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("causalrt.export.checkpoint.save_file", half_written)
    with pytest.raises(BuildError, match="No space left"):
        write_weights(checkpoint, MODEL, dtype=torch.float32, out=tmp_path / "o.safetensors")
    assert os.listdir(tmp_path) == ["x.pt"]


# ---- random weights


def test_random_weights_depend_on_name_and_seed_alone():
    deeper = ModelConfig(dim=48, num_heads=3, num_layers=3, ffn_dim=96, freq_dim=32, text_dim=24, text_len=8)
    first, again, longer = (dict(random_weights(m, seed=3)) for m in (MODEL, MODEL, deeper))
    other = dict(random_weights(MODEL, seed=4))
    assert {name: tuple(tensor.shape) for name, tensor in first.items()} == model_shapes(MODEL)
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        assert torch.equal(tensor, longer[name])
        assert not torch.equal(tensor, other[name])
    assert not torch.equal(first["blocks.0.self_attn.q.weight"], first["blocks.1.self_attn.q.weight"])


# ---- memory

MEMORY_SCRIPT = """
import sys
from pathlib import Path
import torch
from causalrt.config import ModelConfig
from causalrt.export.checkpoint import open_checkpoint, write_weights

def status(field):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(field + ":")) * 1024

source, out, dtype, model = Path(sys.argv[1]), Path(sys.argv[2]), getattr(torch, sys.argv[3]), eval(sys.argv[4])
warm = torch.randn(1 << 16).to(dtype).aminmax()
Path("/proc/self/clear_refs").write_text("5")
baseline = status("VmRSS")
assert status("VmHWM") - baseline < 1 << 20, "the peak was not reset"
write_weights(open_checkpoint(source), model, dtype=dtype, out=out)
print(status("VmHWM") - baseline)
"""

LARGE = ModelConfig(dim=512, num_heads=8, num_layers=18, ffn_dim=2048)


@pytest.fixture(scope="module")
def large_sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    weights = dict(random_weights(LARGE, seed=0))
    assert sum(tensor.nbytes for tensor in weights.values()) > 290e6
    torch.save({"generator_ema": {f"model.{n}": t for n, t in weights.items()}}, folder / "large.pt")
    save_file(weights, folder / "large.safetensors")
    yield folder
    for file in folder.iterdir():
        file.unlink()


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from Linux's /proc")
@pytest.mark.parametrize("source", ["large.pt", pytest.param("large.safetensors", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_peak_memory_is_that_of_the_target(large_sources, source, dtype):
    out = large_sources / "out.safetensors"
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEMORY_SCRIPT), large_sources / source, out, dtype, repr(LARGE)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert child.returncode == 0, child.stderr
    growth, target = int(child.stdout), out.stat().st_size
    assert growth < 1.3 * target, f"peak grew by {growth / 2**20:.0f} MiB for a target of {target / 2**20:.0f} MiB"
    assert growth > 0.9 * target, "the measurement misses what was surely allocated"
