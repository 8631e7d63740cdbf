"""`causalrt bench` on small bundles: what it writes, what it refuses, what it leaves behind. No time is asserted."""

import json
import os
import re
import shlex
import shutil
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.small_bundles import bundle_factory, write_checkpoint
from support.small_encoders import write_vae

from causalrt import Engine, Session, build, override, recipe
from causalrt.cli import main, parse
from causalrt.engines.bundle import MANIFEST, file_digest
from causalrt.measure.bench.replicas import LeftOut
from causalrt.measure.bench.rollouts import Rollouts

FILES = ["bench.json", "bench.png"]


def bench(*arguments: object) -> int:
    return main(["bench", *map(str, arguments)])


def size_of_picture(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:])


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    make = bundle_factory(tmp_path_factory.mktemp("bundles"))
    return [make(1), make(2)]


def test_a_recipe_on_one_and_two_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "folder"
    flags = ["--executors", "eager,onnxruntime", "--world-sizes", "1,2", "--repeats", 2, "--seed", 5, "--threads", 2]
    assert bench("--recipe", "tiny", *flags, "--out", out) == 0
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert min(size_of_picture(out / "bench.png")) > 300
    found = json.loads((out / "bench.json").read_text())
    names = ["eager 1x2", "eager 2x1", "onnxruntime 1x2", "onnxruntime 2x1"]
    assert [row["name"] for row in found["rows"]] == names
    check_manifest(found["manifest"])
    assert (found["left_out"], found["manifest"]["repeats"], found["manifest"]["seed"]) == ([], 2, 5)
    for row in found["rows"]:
        check_row(row)
    # 18 tokens a chunk; by rank 9, of them q, k and v rows of 2 x 2 shares and back: counted, not computed
    exchanges = {row["name"]: row["exchange"] for row in found["rows"]}
    assert exchanges["eager 1x2"]["bytes_per_chunk"] == 0
    assert exchanges["eager 2x1"] == exchanges["onnxruntime 2x1"]
    assert exchanges["eager 2x1"]["calls_per_chunk"] == 5 * 2 * 2
    assert exchanges["eager 2x1"]["source"] == "counted"
    assert [way["way"] for way in found["ceilings"]] == names
    assert {each["verdict"] for each in found["comparisons"]} == {"none shown"}  # of two repeats
    assert len(found["comparisons"]) == 3 * 6
    said = capsys.readouterr().out
    assert "too few" in said
    assert "times as fast" not in said
    assert all(name in said for name in names)


def check_manifest(manifest: dict[str, Any]) -> None:
    assert manifest["config"]["model"] == json.loads(json.dumps(recipe("tiny").as_dict()))["model"]
    assert manifest["chunks"] == 4
    assert {bundle["world_size"] for bundle in manifest["bundles"]} == {1, 2}
    assert all(len(bundle["sha256"]) == 64 for bundle in manifest["bundles"])
    assert manifest["includes"]["vae"] is manifest["includes"]["text"] is False
    assert manifest["machine"]["device"] == "cpu"
    assert {"torch", "onnxruntime", "causalrt", "python"} <= set(manifest["machine"]["versions"])
    for moment in ("before", "after"):
        assert len(manifest[moment]["load_average"]) == 3
    assert {"cpu", "cores", "commit", "platform"} <= set(manifest["machine"])


def check_row(row: dict[str, Any]) -> None:
    assert row["chunk_latency_ms"]["n"] == 2 * 4
    assert [chunk["kv_frames"] for chunk in row["by_chunk"]] == [3, 6, 7, 7]
    assert len(row["denoising_steps_ms"]) == 4
    cold, warm = row["first_frame"]["cold"], row["first_frame"]["warm"]
    assert (cold["total_ms"]["n"], warm["total_ms"]["n"]) == (1, 2)
    assert set(cold["stages_ms"]) - set(warm["stages_ms"]) == {"start", "load"}
    assert sum(cold["stages_ms"].values()) == pytest.approx(cold["total_ms"]["p50"], rel=0.05)
    assert row["frames_per_second"]["chunks"] == [2]
    peaks = row["peak_memory"]
    assert len(peaks["rank_bytes"]) == row["world_size"]
    assert min(peaks["rank_bytes"]) > 2**25
    assert peaks["device_bytes"] is row["host_waits_per_chunk"] is None
    for way in ("of_eager_ops", "of_own_ops"):
        assert row["roofline"][way]["products"]["median"] > 0
    assert 0 <= row["largest_difference"] < 1e-4
    assert row["checks"]["flat_once_full"]["chunks"] == [2, 3]


DOC = (Path(__file__).parents[2] / "docs" / "bench.md").read_text()


@pytest.mark.parametrize("command", re.findall(r"^causalrt (.*)$", DOC, flags=re.MULTILINE))
def test_every_documented_command_parses(command: str) -> None:
    function, _ = parse(shlex.split(command, comments=True))
    assert function.__module__.startswith("causalrt.commands.")


# ---- bundles: two of them, eager, without ceilings and picture


def short(*more: object) -> list[object]:
    return ["--executors", "eager", "--repeats", 1, "--chunks", 2, "--no-ceilings", "--no-picture", *more]


def test_bundles(bundles: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(*bundles, *short("--out", tmp_path, "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "bench.json").read_text())
    assert [row["world_size"] for row in found["rows"]] == [1, 2]
    hashes = [bundle["sha256"] for bundle in found["manifest"]["bundles"]]
    assert hashes == [file_digest(path / MANIFEST) for path in bundles]
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]
    assert found["rows"][0]["roofline"] is None
    assert found["rows"][0]["checks"]["flat_once_full"]["held"] is None


def test_other_work_is_an_error(
    bundles: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    session, pids = Engine.session, []

    def other_noise(engine: Engine, prompt: Any, *, seed: int, **options: Any) -> Session:
        pids.extend(engine.rank_pids)
        return session(engine, prompt, seed=seed + (engine.config.build.world_size == 2), **options)

    monkeypatch.setattr(Engine, "session", other_noise)
    assert bench(*bundles, *short("--out", tmp_path)) == 2
    assert "not the same work" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert pids
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_ctrl_c_leaves_nothing(
    bundles: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pids: list[int] = []

    def interrupt(rollouts: Rollouts, repeat: int) -> None:
        pids.extend(pid for engine in rollouts._engines.values() for pid in engine.rank_pids)
        raise KeyboardInterrupt

    monkeypatch.setattr(Rollouts, "repeat", interrupt)
    assert bench(bundles[1], *short("--out", tmp_path)) == 130
    assert "interrupted" in capsys.readouterr().err
    assert len(pids) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert list(tmp_path.iterdir()) == []


def test_rollouts_longer_than_a_session_keeps_times_for(
    bundles: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("causalrt.runtime.session.MAX_TIMES", 1)
    assert bench(bundles[1], *short("--chunks", 3, "--out", tmp_path, "--json")) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert [chunk["chunk"] for chunk in row["by_chunk"]] == [0, 1, 2]


def test_a_process_that_does_not_start_ends_the_benchmark(
    bundles: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("causalrt.measure.bench.rollouts.PROCESS_START_S", 0.001)
    assert bench(bundles[0], *short("--out", tmp_path)) == 2
    assert "the start of a process could not be timed" in capsys.readouterr().err


def test_single_ops_that_give_no_answer_end_the_benchmark(
    bundles: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("causalrt.tools.ops.rank_processes.ANSWER_S", 0.001)
    flags = ["--executors", "eager", "--repeats", 1, "--chunks", 1, "--no-picture"]
    assert bench(bundles[0], *flags, "--out", tmp_path) == 2
    assert "no answer within 0.001 s" in capsys.readouterr().err


# ---- refusals, before anything is loaded


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(rollouts: Rollouts, *_: object) -> None:
        raise AssertionError("something was loaded")

    monkeypatch.setattr(Rollouts, "load", load)


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--executors", "eagr"], "this version has"),
        (["--executors", "tensorrt", "--device", "cpu"], "tensorrt"),
        (["--recipe", "nope"], "the recipes are"),
        (["--repeats", "0"], "--repeats"),
        (["--threads", "0"], "--threads"),
        (["--chunks", "99"], "horizon"),
        (["--seed", "-1"], "seed"),
        (["--world-sizes", "0"], "world_size"),
        (["--set", "video.windows=9"], "the fields are"),
    ],
)
def test_refusals(flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--recipe", "tiny", "--device", "cpu", *flags, "--out", tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--executors", ""], "leave it out for all"),
        (["--world-sizes", ","], "leave it out for all"),
        (["--world-sizes", "1,two"], "whole numbers, separated by commas"),
    ],
)
def test_lists_that_are_none(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("unloaded")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for executors in ([], ["--executors", "eager"]):
        assert bench("--recipe", "tiny", "--device", "cuda", *executors, "--out", tmp_path) == 2
        assert "torch sees 0 here" in capsys.readouterr().err


@pytest.mark.usefixtures("unloaded")
def test_refusals_of_bundles(bundles: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(bundles[0], "--world-sizes", 2, "--out", tmp_path) == 2
    assert "--world-size 2" in capsys.readouterr().err
    assert bench(bundles[0], "--recipe", "tiny", "--out", tmp_path) == 2
    assert "leave --recipe" in capsys.readouterr().err
    assert bench(tmp_path, "--out", tmp_path) == 2
    assert "is no bundle" in capsys.readouterr().err
    assert bench(bundles[0], bundles[0], "--out", tmp_path) == 2
    assert "given twice" in capsys.readouterr().err


@pytest.mark.usefixtures("unloaded")
def test_too_little_memory(
    bundles: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("causalrt.measure.bench.replicas.available_bytes", lambda: 1000)
    assert bench(*bundles, *short("--out", tmp_path)) == 2
    assert "all replicas stay loaded" in capsys.readouterr().err


@pytest.mark.usefixtures("unloaded")
def test_no_matplotlib(
    bundles: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert bench(*bundles, "--out", tmp_path) == 2
    assert "--no-picture" in capsys.readouterr().err


@pytest.mark.usefixtures("unloaded")
def test_a_folder_that_cannot_be_written(
    bundles: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert bench(*bundles, *short("--out", tmp_path / "file")) == 2
    assert "--out" in capsys.readouterr().err
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert bench(*bundles, *short("--out", tmp_path)) == 2
    assert "cannot write" in capsys.readouterr().err


def test_a_report_is_written_whole_or_not_at_all(
    bundles: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bench.json").write_text("the last one")

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(
        "causalrt.measure.bench.command.measure", lambda *_, **__: LeftOut(executor="a", world_size=1, reason="")
    )
    monkeypatch.setattr(os, "replace", full_disk)
    assert bench(bundles[0], *short("--out", tmp_path)) == 2
    assert "No space left" in capsys.readouterr().err
    assert [path.read_text() for path in tmp_path.iterdir()] == ["the last one"]


# ---- with a VAE, and with an independent first frame


@pytest.mark.slow
def test_frames(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = recipe("tiny")
    vae = write_vae(tmp_path)
    bundle = build(
        config,
        checkpoint=write_checkpoint(config, tmp_path / "checkpoint.safetensors"),
        vae=vae,
        out=tmp_path / "bundle",
        executors=["eager"],
    )
    for flags, decodes in (([], True), (["--no-vae"], False)):
        assert bench(bundle, *short("--out", tmp_path / "out", "--json", *flags)) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["manifest"]["includes"]["vae"] is decodes
        assert (found["rows"][0]["stages_ms"]["decode"]["p50"] > 0) is decodes
        assert (found["rows"][0]["peak_memory"]["decoder_bytes"] is not None) is decodes


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor wants a C++ compiler")
def test_inductor_and_two_kinds_of_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = ["video.independent_first_frame=true", "video.horizon_frames=7", "video.window_frames=7"]
    flags = ["--executors", "eager,inductor", "--world-sizes", 2, "--repeats", 1, "--json", "--no-picture"]
    sets = [flag for change in changes for flag in ("--set", change)]
    assert bench("--recipe", "tiny", *sets, *flags, "--out", tmp_path) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["exchange"]["source"] for row in found["rows"]] == ["counted", "computed"]
    assert override(recipe("tiny"), dict(change.split("=") for change in changes)).video.horizon_chunks == 3
    assert found["manifest"]["chunks"] == 3
