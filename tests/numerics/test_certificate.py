"""The parity certificate: good bundles pass, and each way of damaging one is caught and named."""

import contextlib
import dataclasses
import json
import re
import shlex
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.damage import change_constant, change_weight, copy_of, hash_again, hold_weight
from support.small_bundles import bundle_factory, tiny_config, write_checkpoint
from support.tolerances import MODULE

from causalrt.cli import main
from causalrt.engines.base import SessionView
from causalrt.engines.bundle import WEIGHTS, open_bundle
from causalrt.engines.eager import EagerExecutor
from causalrt.engines.onnxruntime import OnnxRuntimeExecutor
from causalrt.errors import BundleError, CheckpointError, ExecutorError, OutOfMemoryError, RequestError
from causalrt.export.build import build
from causalrt.export.checkpoint import DIGESTS
from causalrt.install_hint import install_extra
from causalrt.layout import layout_from_config
from causalrt.model.wan.conditioning import Conditioning
from causalrt.proof import certify as certify_module
from causalrt.proof import comparisons, replica
from causalrt.proof.certificate import Certificate
from causalrt.proof.certify import certify
from causalrt.proof.file_checks import check_digests
from causalrt.proof.trace import TracedCollectives

RANKS = 2


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """So small a model gains nothing from a second one, which spins while it waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bundles")


@pytest.fixture(scope="module")
def bundles(folder):
    (folder / "onnx").mkdir()
    return bundle_factory(folder / "onnx", executor="onnxruntime")


@pytest.fixture(scope="module")
def checkpoint(folder):
    return write_checkpoint(tiny_config(), folder / "checkpoint.safetensors")


@pytest.fixture(scope="module")
def low_bundle(checkpoint, folder):
    config = tiny_config(RANKS, {"build.precision": "bfloat16"})
    return build(config, checkpoint=checkpoint, out=folder / "bfloat16", executors=["eager"])


@pytest.fixture(scope="module")
def certificate(bundles, checkpoint, folder):
    """Of a good bundle on two ranks, rank processes included; and where it lies."""
    out = folder / "certificate"
    return certify(bundles(RANKS), checkpoint=checkpoint, out=out, bisect=True), out


def certified(bundle: Path, **arguments: Any) -> Certificate:
    """Without rank processes, which have tests of their own."""
    return certify(bundle, processes=False, **arguments)


def faults(certificate: Certificate, name: str) -> tuple[str, ...]:
    (check,) = [check for check in certificate.checks if check.name == name]
    return check.faults


def failed(certificate: Certificate) -> set[str]:
    return {part.name for part in (*certificate.checks, *certificate.comparisons) if not part.passed}


# ---- good bundles


def test_a_good_bundle_passes(certificate):
    found, _ = certificate
    assert found.passed
    assert found.first_wrong is None
    assert [check.name for check in found.checks] == [
        *("hashes", "tables", "references", "weights", "checkpoint", "exchanges", "canary")
    ]
    assert [(c.name, c.candidate) for c in found.comparisons] == [
        ("rollout", "eager, 2 ranks"),
        ("rollout", "onnxruntime, 2 ranks"),
        ("chunk step", "onnxruntime, 2 ranks"),
        ("segment", "onnxruntime, each segment"),
        ("processes", "onnxruntime, 2 ranks, processes"),
        ("processes", "onnxruntime, 2 ranks, processes"),
    ]
    assert all(len(comparison.errors) >= 30 for comparison in found.comparisons)
    assert found.not_checked == []


def test_its_rollouts_see_every_kind_of_tensor(certificate):
    found, _ = certificate
    names = [error.name for error in found.comparisons[1].errors]
    for chunk in range(3):
        for made in ("step 0 flow", "step 3 x0", "latents", "refresh flow", "layer 1 rank 1 shard 1 v"):
            assert f"chunk {chunk} {made}" in names
    assert {"prompt 0 layer 0 cross_k", "prompt 1 layer 1 cross_v", "time 1000 e0", "time 0 e"} <= set(names)
    assert names.index("chunk 0 latents") < names.index("chunk 0 refresh flow") < names.index("chunk 1 step 0 flow")


def test_bisection_on_demand_names_where_the_largest_difference_arises(certificate):
    found, out = certificate
    segment = next(comparison for comparison in found.comparisons if comparison.name == "segment")
    assert found.bisected["value"] == segment.worst.where["value"]
    assert found.bisected["part"].startswith(("layer ", "head"))
    assert found.bisected["made_by"] == found.bisected["operations"][0]
    assert "Where the largest difference arises" in (out / "certificate.md").read_text()


def test_the_files_say_what_was_found(certificate, bundles):
    found, out = certificate
    plain = json.loads((out / "certificate.json").read_text())
    assert plain["passed"] is True
    assert plain["tolerance"] == 5e-5
    assert len(plain["bundle"]["manifest_sha256"]) == 64
    assert set(plain["bundle"]["files"]) == {path.name for path in bundles(RANKS).iterdir()} - {"manifest.json"}
    assert plain["plan"]["num_chunks"] == 3
    assert plain["plan"]["evicted_chunk"] == plain["plan"]["switch_chunk"] == 2
    assert {"torch", "onnxruntime", "polygraphy", "python"} <= set(plain["versions"])
    for comparison, made in zip(plain["comparisons"], found.comparisons, strict=True):
        assert comparison["worst"]["error"] == max(comparison["errors"].values()) == made.worst.error
    assert set(plain["errors_by_chunk"]) == {
        *("eager, 2 ranks", "onnxruntime, 2 ranks", "onnxruntime, 2 ranks, processes")
    }
    assert all(set(errors) == {"0", "1", "2"} for errors in plain["errors_by_chunk"].values())
    assert (out / "certificate.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.iterdir()) == [
        *("certificate.json", "certificate.md", "certificate.png", "polygraphy")
    ]


def commands(out: Path) -> list[list[str]]:
    return [
        shlex.split(line) for line in (out / "certificate.md").read_text().splitlines() if line.startswith("polygraphy")
    ]


def polygraphy(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """The command line of a certificate, by the Polygraphy of this environment."""
    program = Path(sys.executable).parent / "polygraphy"
    return subprocess.run([sys.executable, str(program), *arguments[1:]], capture_output=True, text=True, check=False)


def test_polygraphys_own_command_line_passes_a_segment(certificate, bundles):
    _, out = certificate
    found = commands(out)
    assert [Path(command[2]).name for command in found] == [f"step-00{number}.onnx" for number in range(5)]
    result = polygraphy(found[2])
    assert result.returncode == 0, result.stdout[-2000:]
    assert "Passed: 1/1 iterations" in result.stdout


@pytest.mark.slow
def test_polygraphys_own_command_line_passes_all_segments_but_a_damaged_one(certificate, bundles, tmp_path):
    _, out = certificate
    for command in commands(out):
        assert polygraphy(command).returncode == 0
    broken = copy_of(bundles(RANKS), tmp_path / "broken")
    hold_weight(broken, "step-002.onnx", "blocks.0.ffn.0.weight", halve_first)
    command = commands(out)[2]
    command[2] = str(broken / "step-002.onnx")
    assert polygraphy(command).returncode != 0


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (1, {}),
        pytest.param(8, {}, marks=pytest.mark.slow),
        pytest.param(2, {"build.head_plan": "padded"}, marks=pytest.mark.slow),
        pytest.param(2, {"video.time_index": "relative"}, marks=pytest.mark.slow),
        pytest.param(
            2, {"video.independent_first_frame": "true", "video.horizon_frames": "13"}, marks=pytest.mark.slow
        ),
    ],
)
def test_good_bundles_of_other_kinds_pass(bundles, world_size, changes):
    found = certified(bundles(world_size, changes))
    assert found.passed, found.first_wrong
    assert {comparison.name for comparison in found.comparisons} == {"rollout", "chunk step", "segment"}


@pytest.mark.slow
def test_fused_ops_pass(checkpoint, tmp_path):
    bundle = build(tiny_config(RANKS), checkpoint=checkpoint, out=tmp_path / "bundle", fused_ops="on")
    found = certified(bundle)
    assert found.passed, found.first_wrong


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, RANKS])
def test_inductor_passes(bundles, world_size):
    found = certify(bundles(world_size), executor="inductor")
    assert found.passed, found.first_wrong
    from_inside = "exchanges, KV slots and single steps of inductor from inside"
    assert (from_inside in [entry.what for entry in found.not_checked]) == (world_size > 1)


@pytest.mark.parametrize(("executor", "world_size"), [("inductor", RANKS), ("eager", 1)])
def test_nothing_is_certified_that_has_not_run(bundles, executor, world_size):
    """Its ranks cannot be threads, or it is the reference itself, and rank processes are left out."""
    found = certified(bundles(world_size), executor=executor)
    assert all(comparison.passed for comparison in found.comparisons)
    assert not found.passed
    assert found.first_wrong is not None
    assert f"no rollout of {executor}" in found.first_wrong


def test_a_full_disk_is_no_fault_of_the_bundle(bundles, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("causalrt.proof.segments.save_json", full)
    with pytest.raises(RequestError, match=r"No space left.*--out"):
        certified(bundles(1), out=tmp_path / "certificate")
    assert list(tmp_path.iterdir()) == []


def test_a_lower_precision_is_held_against_eagers_own_error(low_bundle, checkpoint, tmp_path):
    found = certified(low_bundle, checkpoint=checkpoint, out=tmp_path / "certificate")
    assert found.passed, found.first_wrong
    assert found.tolerance is None
    (rollout,) = found.comparisons
    assert {"flow", "x0", "latents", "k", "v", "cross_k", "e0"} <= set(rollout.figures)
    assert 1e-4 < rollout.figures["latents"]["rms_error"] < 0.1
    assert json.loads((tmp_path / "certificate" / "certificate.json").read_text())["passed"] is True


def test_a_lower_precision_that_is_too_far_from_float32_fails(low_bundle, monkeypatch):
    swap_blocks_of(monkeypatch, exchange=1)
    found = certified(low_bundle)
    assert failed(found) == {"rollout", "exchanges"}


@pytest.mark.parametrize("collectives", ["engine", pytest.param("runtime", marks=pytest.mark.slow)])
def test_graphs_of_engines_pass_where_there_is_no_gpu(bundles, checkpoint, tmp_path, collectives):
    from support.stand_in_bundles import build_stand_in

    bundle = build_stand_in(
        tiny_config(RANKS),
        checkpoint=checkpoint,
        out=tmp_path / "bundle",
        collectives=collectives,
        small_graphs=bundles(RANKS),
    )
    if not torch.cuda.is_available():
        with pytest.raises(ExecutorError, match=r"torch sees 0 here.*--emulate.*--executor eager"):
            certified(bundle)
    found = certified(bundle, emulate=True)
    assert failed(found) == {"networks"}  # a stand-in leaves no description of them
    assert [c.candidate for c in found.comparisons] == [
        *("eager, 2 ranks", "tensorrt_rtx (emulated by onnxruntime), 2 ranks")
    ]
    assert len(found.comparisons[1].errors) == len(found.comparisons[0].errors)
    assert "rank processes" in [entry.what for entry in found.not_checked]


# ---- damaged files


def flip_row(array: np.ndarray[Any, Any]) -> None:
    array[-1] = np.roll(array[-1], 1)


def swap_two(array: np.ndarray[Any, Any]) -> None:
    array[[3, 40]] = array[[40, 3]]


def halve_first(array: np.ndarray[Any, Any]) -> None:
    array.flat[0] = array.flat[0] / 2 + 1


@pytest.fixture
def broken(bundles, tmp_path):
    return copy_of(bundles(RANKS), tmp_path / "broken")


def test_a_row_of_a_table_that_no_short_rollout_reads(broken):
    change_constant(broken, "step-000.onnx", lambda tensor: tensor.name == "temporal_cos", flip_row)
    found = certified(broken, executor="eager")
    assert failed(found) == {"tables"}
    (fault,) = faults(found, "tables")
    assert re.match(r"step-000\.onnx: table temporal_cos differs in rows 11: at \[11, \d\] got .*, expected ", fault)
    assert found.first_wrong == fault


def test_two_entries_of_a_packing_index(broken):
    size = layout_from_config(tiny_config(RANKS)).scatter_index().size
    name = change_constant(broken, "step-002.onnx", lambda tensor: list(tensor.dims) == [size], swap_two)
    found = certified(broken)
    assert failed(found) == {"tables", "rollout", "chunk step", "segment"}
    (fault,) = faults(found, "tables")
    assert fault.startswith(
        f"step-002.onnx: table scatter_index (there called {name}) differs in entries 3, 40 (row 3 of the block to rank 0)"
    )
    assert found.bisected["segment"] == "step-002.onnx"
    assert found.bisected["part"] == "layer 1 self-attention: q, k, v, their norms and rotation, packing"
    assert any(operation.startswith("Gather ") for operation in found.bisected["operations"])


def test_a_weight_with_and_without_a_checkpoint(broken, checkpoint):
    change_weight(broken, "blocks.1.cross_attn.o.weight", halve_first)
    found = certified(broken, executor="eager")
    assert failed(found) == {"weights"}
    (fault,) = faults(found, "weights")
    assert fault == f"{WEIGHTS}: blocks.1.cross_attn.o.weight is not what the build wrote (its sha256 differs)"
    with_checkpoint = certified(broken, executor="eager", checkpoint=checkpoint)
    assert failed(with_checkpoint) == {"weights", "checkpoint"}
    (fault,) = faults(with_checkpoint, "checkpoint")
    assert (
        "blocks.1.cross_attn.o.weight differs from checkpoint.safetensors in 1 of 2304 values: at [0, 0] got" in fault
    )


def test_a_weight_where_the_build_left_no_digests_is_named_by_a_checkpoint_alone(checkpoint, tmp_path):
    bundle = build(tiny_config(RANKS), checkpoint=checkpoint, out=tmp_path / "bundle", executors=["eager"])
    weights = load_file(bundle / WEIGHTS)
    halve_first(weights["head.head.bias"].numpy())
    save_file(weights, bundle / WEIGHTS)
    hash_again(bundle)
    found = certified(bundle)
    assert found.passed
    assert [entry.what for entry in found.not_checked] == [
        *("weights against what the build wrote", "weights against a checkpoint", "rank processes")
    ]
    found = certified(bundle, checkpoint=checkpoint)
    assert failed(found) == {"checkpoint"}
    assert "head.head.bias differs" in str(found.first_wrong)


def test_a_weight_that_alone_has_no_digest(broken):
    with safe_open(broken / WEIGHTS, framework="pt") as file:
        digests = json.loads(file.metadata()[DIGESTS])
    del digests["head.head.bias"]
    weights = load_file(broken / WEIGHTS)
    save_file(weights, broken / WEIGHTS, metadata={DIGESTS: json.dumps(digests)})
    hash_again(broken)
    checked, wrong = check_digests(open_bundle(broken))
    assert wrong == [f"{WEIGHTS}: head.head.bias has no digest, though others have"]
    assert checked == len(weights) - 1


def test_a_weight_that_a_graph_holds_itself(broken):
    hold_weight(broken, "step-002.onnx", "blocks.0.ffn.0.weight", halve_first)
    found = certified(broken)
    assert failed(found) == {"references", "rollout", "chunk step", "segment"}
    assert faults(found, "references") == (
        f"step-002.onnx: weight blocks.0.ffn.0.weight is held by the graph itself, not by {WEIGHTS}",
    )
    assert found.bisected["part"] == "layer 0 feed-forward"
    assert "layer 0 cross-attention" in found.bisected["agreed_before"]
    assert any(operation.startswith("Gemm ") for operation in found.bisected["operations"])


def test_a_constant_that_no_table_explains_is_found_by_its_values(bundles, tmp_path):
    """On one rank, where the whole step is one graph: the residual stream says which layer it is."""
    bundle = copy_of(bundles(1), tmp_path / "broken")
    dim = tiny_config().model.dim

    def is_ones(tensor: onnx.TensorProto) -> bool:
        return list(tensor.dims) == [dim] and not tensor.name.startswith("wan.")

    change_constant(bundle, "step-000.onnx", is_ones, halve_first)
    found = certified(bundle, out=tmp_path / "certificate")
    assert failed(found) == {"rollout", "chunk step", "segment"}
    assert found.bisected["part"].startswith("layer 0 self-attention")
    assert (found.bisected["chunk"], found.bisected["forward"]) == (0, "step 0")
    plain = json.loads((tmp_path / "certificate" / "certificate.json").read_text())
    assert plain["passed"] is False
    assert plain["bisected"] == found.bisected
    assert plain["first_wrong"] == found.first_wrong
    assert (
        "Where the executor leaves eager:** layer 0 self-attention"
        in (tmp_path / "certificate" / "certificate.md").read_text()
    )


def test_a_weight_that_is_not_a_number(broken, tmp_path):
    def spoil(array: np.ndarray[Any, Any]) -> None:
        array.flat[5] = np.nan

    change_weight(broken, "blocks.0.ffn.2.bias", spoil)
    found = certified(broken, executor="eager", out=tmp_path / "certificate")
    assert {"weights", "rollout"} <= failed(found)
    assert f"{WEIGHTS}: blocks.0.ffn.2.bias holds 1 values that are not finite" in faults(found, "weights")
    plain = json.loads((tmp_path / "certificate" / "certificate.json").read_text())
    assert plain["comparisons"][0]["worst"]["error"] == "inf"


def test_a_graph_that_cannot_be_read_is_a_finding(broken):
    (broken / "step-001.onnx").write_bytes(b"\xff" * 100)
    found = certified(hash_again(broken))
    assert "tables" in failed(found)
    assert any(
        "the rollout of onnxruntime, 2 ranks failed" in fault for made in found.comparisons for fault in made.faults
    )


# ---- damage while it runs


def swap_blocks_of(monkeypatch: pytest.MonkeyPatch, *, exchange: int) -> None:
    """Rank 1 takes the blocks of one exchange of each forward in the wrong order."""
    right = TracedCollectives.__mro__[1].all_to_all

    def wrong(self: TracedCollectives, received: torch.Tensor, sent: torch.Tensor) -> None:
        right(self, received, sent)
        if self.rank == 1 and getattr(self, "exchanges", -1) == exchange:
            received.copy_(received.flip(0))

    monkeypatch.setattr(TracedCollectives.__mro__[1], "all_to_all", wrong)


def test_a_block_that_is_exchanged_with_another(bundles, monkeypatch):
    swap_blocks_of(monkeypatch, exchange=1)
    found = certified(bundles(RANKS), executor="eager")
    assert failed(found) == {"exchanges", "rollout"}
    assert faults(found, "exchanges")[0] == (
        "eager, 2 ranks: chunk 0 step 0, layer 0 gather_heads: rank 1 has what rank 1 sent rank 1 in the place of what rank 0 "
        "sent it"
    )
    assert found.bisected["part"] == "layer 0 self-attention"
    assert (found.bisected["chunk"], found.bisected["forward"], found.bisected["rank"]) == (0, "step 0", 1)


def test_a_refresh_without_the_prompt(bundles, monkeypatch):
    """The executor's refresh alone: what it is given, at timestep 0, is another prompt's keys and values, namely none."""
    step, bind = OnnxRuntimeExecutor.step, OnnxRuntimeExecutor.bind
    bound: dict[int, SessionView] = {}

    def remember(self: OnnxRuntimeExecutor, view: SessionView) -> None:
        bound[id(self)] = view
        bind(self, view)

    def wrong(self: OnnxRuntimeExecutor, x: torch.Tensor, time: Conditioning, first_frame: int) -> torch.Tensor:
        view = bound[id(self)]
        if torch.allclose(time["e"], self.embed_time(0.0)["e"], atol=MODULE):
            bind(self, dataclasses.replace(view, prompt={name: 0 * tensor for name, tensor in view.prompt.items()}))
        try:
            return step(self, x, time, first_frame)
        finally:
            bind(self, view)

    monkeypatch.setattr(OnnxRuntimeExecutor, "bind", remember)
    monkeypatch.setattr(OnnxRuntimeExecutor, "step", wrong)
    found = certified(bundles(RANKS))
    assert failed(found) == {"rollout", "chunk step"}
    rollout = next(c for c in found.comparisons if c.candidate == "onnxruntime, 2 ranks")
    assert rollout.first_wrong.name == "chunk 0 refresh flow"
    assert (found.bisected["chunk"], found.bisected["forward"]) == (0, "refresh")
    assert found.bisected["part"].startswith("layer 1 self-attention")  # the first place after a cross-attention


def test_everything_runs_on_the_process_s_own_stream(bundles, monkeypatch):
    """Whatever opens an executor or has it step does so inside `own_stream`, in whichever thread."""
    entered = Counter()

    @contextlib.contextmanager
    def recorded(device):
        assert device == torch.device("cpu")
        entered[threading.get_ident()] += 1
        yield
        entered[threading.get_ident()] -= 1

    def inside(function):
        def call(*args, **options):
            seen.append(entered[threading.get_ident()])
            return function(*args, **options)

        return call

    seen = []
    for module in (certify_module, replica):
        monkeypatch.setattr(module, "own_stream", recorded)
    monkeypatch.setattr(EagerExecutor, "__init__", inside(EagerExecutor.__init__))
    for name in ("__init__", "encode_prompt", "embed_time", "bind", "step"):
        monkeypatch.setattr(OnnxRuntimeExecutor, name, inside(getattr(OnnxRuntimeExecutor, name)))
    assert certified(bundles(RANKS)).passed
    assert len(seen) > 50
    assert min(seen) >= 1


def test_ranks_that_send_to_the_wrong_one(bundles, tmp_path, monkeypatch):
    """Real rank processes, whose collectives are patched as they start; the canary names who got what."""
    (tmp_path / "sitecustomize.py").write_text(
        "import torch.distributed as dist\n"
        "right = dist.all_to_all_single\n"
        "dist.all_to_all_single = lambda received, sent: right(received, sent.flip(0))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = certify(bundles(RANKS), executor="eager")
    assert failed(found) == {"canary", "processes"}
    assert len(faults(found, "canary")) == 2 * RANKS
    assert faults(found, "canary")[0].startswith(
        "scatter_heads: rank 0 expected row 0, channel 0 of what rank 0 sends it, and got row 0, channel 0 of what rank 0 "
        "sends rank 1 ("
    )


# ---- the command


def test_the_command_prints_a_short_verdict(bundles, checkpoint, tmp_path, capsys):
    bundle, out = copy_of(bundles(RANKS), tmp_path / "b"), tmp_path / "certificate"
    change_weight(bundle, "head.modulation", halve_first)
    arguments = ["compare", str(bundle), "--executor", "eager", "--no-processes", "--out", str(out)]
    assert main(arguments) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "FAILED: eager, 2 rank(s), float32, tolerance 5e-05"
    assert any(line.startswith("weights     FAILED") and "head.modulation" in line for line in printed)
    assert printed[-1] == f"certificate {out / 'certificate.md'}"
    assert len(printed) < 15
    assert (
        main(["compare", str(bundles(RANKS)), "--executor", "eager", "--no-processes", "--json", "--out", str(out)])
        == 0
    )
    assert json.loads(capsys.readouterr().out)["passed"] is True  # and the certificate that was there is replaced
    assert json.loads((out / "certificate.json").read_text())["passed"] is True


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"executor": "tensorrt_rtx"}, BundleError, "built for eager, onnxruntime.*--executor tensorrt_rtx"),
        ({"executor": "eager", "emulate": True}, ExecutorError, "--emulate is for tensorrt_rtx and tensorrt"),
        ({"num_chunks": 5}, RequestError, "horizon is 12 latent frames"),
        ({"seed": -1}, RequestError, "seed must be a whole number"),
        ({"checkpoint": Path("nowhere.pt")}, CheckpointError, "nowhere.pt"),
    ],
)
def test_what_cannot_be_certified_is_refused(bundles, tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        certified(bundles(RANKS), out=tmp_path / "certificate", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_without_polygraphy_it_says_what_to_install(bundles, monkeypatch):
    monkeypatch.setitem(sys.modules, "polygraphy", None)
    with pytest.raises(ExecutorError, match=re.escape(install_extra("proof"))):
        certified(bundles(RANKS))


def test_what_would_not_fit_in_memory_is_refused(bundles, tmp_path, monkeypatch):
    monkeypatch.setattr(comparisons, "available_bytes", lambda: 100_000)
    with pytest.raises(OutOfMemoryError, match=r"tensors of 6 forwards.*--chunks 1"):
        certified(bundles(RANKS), out=tmp_path / "certificate")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_else_is_left_alone(bundles, tmp_path):
    (tmp_path / "mine").write_text("dear diary")
    with pytest.raises(RequestError, match="is no certificate"):
        certified(bundles(RANKS), executor="eager", out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give a bundle, to certify it, or --recorded"),
        (["BUNDLE", "--recorded", "x"], "one of the two"),
        (["BUNDLE", "--dtype", "bf16"], "--dtype: the bundle was built one way"),
        (["BUNDLE", "--world-size", "3"], r"built for 2 rank\(s\), not 3"),
    ],
)
def test_options_that_do_not_fit(bundles, capsys, options, message):
    found = [str(bundles(RANKS)) if option == "BUNDLE" else option for option in options]
    assert main(["compare", *found]) == 2
    assert re.search(message, capsys.readouterr().err)
