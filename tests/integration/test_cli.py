"""The commands as a user runs them, in one process; exit codes, JSON, messages, files."""

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import GOLDEN

import causalrt
from causalrt import control_groups
from causalrt.child_python import python_environment
from causalrt.cli import main
from causalrt.errors import ConfigError
from causalrt.export.random_weights import random_weights
from causalrt.recipes import recipe


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    save_file({f"model.{name}": tensor for name, tensor in random_weights(recipe("tiny").model, seed=0)}, path)
    return path


@pytest.fixture(scope="module")
def bundle(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("bundle") / "bundle"
    flags = ["--recipe", "tiny", "--checkpoint", str(checkpoint), "--world-size", "2", "--out", str(out)]
    assert main(["build", *flags]) == 0
    return out


def test_build_reports_overrides(checkpoint, tmp_path, capsys):
    flags = ["--recipe", "tiny", "--checkpoint", str(checkpoint), "--out", str(tmp_path / "b"), "--executor", "eager"]
    assert main(["build", *flags, "--set", "video.window_frames=9", "--set", "sampler.steps=1000,500", "--json"]) == 0
    config = json.loads(capsys.readouterr().out)["config"]
    assert config["video"]["window_frames"] == 9
    assert config["sampler"]["steps"] == [1000, 500]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--recipe", "nope"], "the recipes are"),
        (["--set", "video.windows=9"], "the fields are"),
        (["--set", "video.window_frames"], "FIELD=VALUE"),
        (["--set", "video.window_frames=3"], "the sink"),
        (["--set", "model.num_layers=3"], "--set model.num_layers=2"),
        (["--checkpoint", "/nowhere.pt"], "/nowhere.pt"),
        (["--dtype", "fp32", "--executor", "tensorrt_rtx", "--target", "sm80"], "bf16"),
    ],
)
def test_build_errors_say_what_to_do(checkpoint, tmp_path, capsys, flags, message):
    base = ["build", "--recipe", "tiny", "--checkpoint", str(checkpoint), "--out", str(tmp_path / "b")]
    assert main([*base, *flags]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_build_names_all_that_is_wrong_at_once(tmp_path, capsys):
    flags = ["--recipe", "tiny", "--checkpoint", str(tmp_path / "nowhere.pt"), "--out", str(tmp_path / "b")]
    wrong = [
        "--executor",
        "tensorrt_rtx",
        "--target",
        "h100",
        "--dtype",
        "fp32",
        "--set",
        "video.foo=1",
        "--set",
        "bar",
    ]
    assert main(["build", *flags, *wrong, "--set", "video.window_frames=1"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "error: 6 things are wrong:"
    named = ("FIELD=VALUE", "video.foo", "the sink", "--dtype bf16", "h100", "nowhere.pt")
    assert [part in line for part, line in zip(named, said[1:], strict=True)] == [True] * 6
    assert list(tmp_path.iterdir()) == []


OTHER_COMMANDS = [
    (
        "generate nowhere --prompt fox --switch fox --seed -1 --threads 0 --timeout 0 --out absent/video.gif",
        ["nowhere", "must end in .mp4", "cannot write absent", "seed", "timeout_s", "num_threads", "CHUNK=PROMPT"],
    ),
    (
        "serve nowhere --port 70000 --max-queue -1 --model-name / --allow-origin a --allow-origin b --host 0.0.0.0 "
        "--threads 0 --spool taken",
        [
            "--text-encoder FOLDER",
            "max_queue",
            "port",
            "model_name",
            "'a'",
            "'b'",
            "--tokens FILE",
            "num_threads",
            "nowhere",
            "taken is not a spool",
        ],
    ),
    (
        "serve --text-encoder words --executor inductor --tokens nowhere --keep 0",
        ["name the bundle", "not built for inductor", "job_ttl_s", "tokens in nowhere"],
    ),
    (
        "bench nowhere --repeats 0 --threads 0 --seed -1 --out taken/file",
        ["--repeats", "--threads", "seed", "cannot write to taken/file", "nowhere"],
    ),
    (
        "bench --recipe tiny --repeats 0 --set video.foo=1 --set video.window_frames=1 --out out",
        ["--repeats", "video.foo", "the sink"],
    ),
    (
        "plan --recipe tiny --gpu abacus --set video.foo=1 --world-size 0 --straggler -1 --timeline absent/t.png",
        ["video.foo", "world_size", "abacus", "straggler", "cannot write absent"],
    ),
    ("plan --recipe tiny --vae own --set bar", ["FIELD=VALUE", "leave --vae out", "say what to plan for"]),
    (
        "compare nowhere --dtype bf16 --out taken --checkpoint absent.pt",
        ["--dtype: the bundle", "nowhere", "taken exists and is no certificate", "absent.pt"],
    ),
    (
        "demo --chunks 99 --seed -1 --switch 1=dodo --prompt unicorn --out taken/file",
        ["1 to 42 chunks", "unicorn", "dodo", "seed", "cannot write to taken/file"],
    ),
]


@pytest.mark.parametrize(("command", "named"), OTHER_COMMANDS, ids=[command[:16] for command, _ in OTHER_COMMANDS])
def test_every_command_names_all_that_is_wrong_at_once(tmp_path, monkeypatch, capsys, command, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    assert main(command.split()) == 2
    first, *said = capsys.readouterr().err.splitlines()
    assert first == f"error: {len(named)} things are wrong:"
    assert [part in line for part, line in zip(named, said, strict=True)] == [True] * len(named), said
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "taken"]


def test_a_bundle_s_limits_are_named_with_the_rest(bundle, tmp_path, capsys):
    out = tmp_path / "video.mp4"
    flags = ["--prompt-embeds", str(tmp_path / "absent.npy"), "--chunks", "99", "--out", str(out)]
    assert main(["generate", str(bundle), *flags]) == 2
    first, *said = capsys.readouterr().err.splitlines()
    assert first == "error: 3 things are wrong:"
    named = ("absent.npy", "built without a VAE", "horizon")
    assert [part in line for part, line in zip(named, said, strict=True)] == [True] * 3, said


def test_override_names_all_that_is_wrong_at_once():
    with pytest.raises(ConfigError, match=r"(?s)2 things .*no field 'video.foo'.*sampler.steps must be"):
        causalrt.override(recipe("tiny"), {"video.foo": "1", "sampler.steps": "many"})


def test_build_for_tensorrt_is_bfloat16_unless_a_type_is_named(checkpoint, tmp_path, capsys):
    pytest.importorskip("tensorrt_rtx", reason="engines are built with tensorrt_rtx: pip install '.[tensorrt-rtx]'")
    flags = ["--recipe", "tiny", "--checkpoint", str(checkpoint), "--executor", "tensorrt_rtx", "--target", "sm80"]
    assert main(["build", *flags, "--out", str(tmp_path / "b")]) == 0
    assert "in bfloat16" in capsys.readouterr().out
    assert causalrt.engines.bundle.open_bundle(tmp_path / "b").config.build.precision == "bfloat16"
    assert main(["build", *flags, "--out", str(tmp_path / "c"), "--set", "build.precision=float32"]) == 2
    assert "--dtype bf16" in capsys.readouterr().err


STEERING = "\x1b]0;owned\x07\u202e"


@pytest.mark.parametrize(
    "command",
    [
        ["build", "--recipe", STEERING, "--checkpoint", "c", "--out", "b"],
        ["build", "--recipe", "tiny", "--checkpoint", f"/nowhere/{STEERING}", "--out", "b"],
        ["inspect", f"/nowhere/{STEERING}"],
        ["inspect", "bundle", f"--{STEERING}"],
    ],
    ids=["value", "checkpoint", "bundle", "flag"],
)
def test_messages_do_not_steer_the_terminal(capsys, command):
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "owned" in said
    assert not set("\x1b\x07\u202e") & set(said)


def test_tensor_names_do_not_steer_the_terminal(tmp_path, capsys):
    tensors = {f"model.{name}": tensor for name, tensor in random_weights(recipe("tiny").model, seed=0)}
    save_file({**tensors, f"model.{STEERING}": torch.zeros(1)}, tmp_path / "model.safetensors")
    flags = ["--recipe", "tiny", "--checkpoint", str(tmp_path / "model.safetensors"), "--out", str(tmp_path / "b")]
    assert main(["build", *flags]) == 2
    said = capsys.readouterr().err
    assert r"\x1b]0;owned\x07\u202e" in said
    assert "\x1b" not in said


def test_names_in_tables_do_not_steer_the_terminal(bundle, tmp_path, capsys):
    named = tmp_path / f"bundle{STEERING}"
    shutil.copytree(bundle, named)
    assert main(["inspect", str(named)]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_build_without_a_terminal_says_when_a_stage_has_ended(checkpoint, tmp_path, capsys):
    flags = ["--recipe", "tiny", "--checkpoint", str(checkpoint), "--out", str(tmp_path / "b")]
    assert main(["build", *flags]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in (lines[0], lines[-1])] == ["weights", "hashes"]
    assert all(re.fullmatch(r".+: (\d+)/\1, done in \d+\.\d s", line) for line in lines), lines


def test_inspect(bundle, capsys):
    assert main(["inspect", str(bundle), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert sum(graph["exchange_after"] for graph in found["graphs"]) == 2 * recipe("tiny").model.num_layers
    attentions = sum(graph["ops"].get("MultiHeadAttention", 0) for graph in found["graphs"])
    # 3 heads on 2 ranks: each layer attends for a whole head, half of another, and the prompt.
    assert attentions == 3 * recipe("tiny").model.num_layers
    weights = load_file(bundle / "weights.safetensors")
    assert found["parameters"] == sum(tensor.numel() for tensor in weights.values())
    assert main(["inspect", str(bundle)]) == 0
    assert main(["inspect", str(bundle / "..")]) == 2


def test_graphs_do_not_say_where_they_were_built(bundle):
    package = str(Path(causalrt.__file__).parent).encode()
    assert not [path.name for path in bundle.glob("*.onnx") if package in path.read_bytes()]


def test_weights_are_stored_once(bundle):
    stored = set(load_file(bundle / "weights.safetensors"))
    used = Counter()
    for path in bundle.glob("*.onnx"):
        for tensor in onnx.load(path, load_external_data=False).graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                assert {entry.key: entry.value for entry in tensor.external_data}["location"] == "weights.safetensors"
                used[tensor.name.removeprefix("wan.")] += 1
            else:
                assert math.prod(tensor.dims) < 5000, f"{tensor.name} {list(tensor.dims)} stands in {path.name}"
    assert used == Counter(stored)


@pytest.mark.parametrize("suffix", [".safetensors", ".npy", ".pt"])
def test_generate(bundle, tmp_path, capsys, suffix):
    embeds = torch.randn(5, recipe("tiny").model.text_dim, generator=torch.Generator().manual_seed(1))
    prompt, out = tmp_path / f"prompt{suffix}", tmp_path / "latents.safetensors"
    if suffix == ".safetensors":
        save_file({"anything": embeds}, prompt)
    elif suffix == ".npy":
        np.save(prompt, embeds.numpy())
    else:
        torch.save(embeds, prompt)
    flags = [str(bundle), "--prompt-embeds", str(prompt), "--seed", "3", "--chunks", "2", "--out", str(out), "--json"]
    assert main(["generate", *flags]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert [chunk["chunk"] for chunk in summary["chunks"]] == [0, 1]
    latents = load_file(out)["latents"]
    assert latents.shape == (6, 16, 4, 6)
    assert latents.isfinite().all()
    assert latents.std() > 0.1
    with safe_open(out, framework="pt") as file:
        assert file.metadata()["seed"] == "3"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([prompt.name, out.name])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--chunks", "5"], "horizon"),
        (["--seed", "-1"], "seed"),
        (["--out", "video.gif"], "must end in .mp4 for a video or .safetensors for latents, got video.gif"),
        (["--out", "video.mp4"], "was built without a VAE; build it again with `--vae FILE`"),
        (["--given", "clip.mp4"], "was built without a VAE; build it again with `--vae FILE`"),
        (["--out", "/nowhere/at/all.safetensors"], "cannot write"),
        (["--prompt-embeds", "/nowhere.npy"], "/nowhere.npy"),
        (["--prompt-embeds", "/nowhere.txt"], ".safetensors, .npy or .pt"),
    ],
)
def test_generate_errors_say_what_to_do(bundle, tmp_path, capsys, flags, message):
    prompt = tmp_path / "prompt.npy"
    np.save(prompt, np.zeros((5, recipe("tiny").model.text_dim), np.float32))
    base = ["generate", str(bundle), "--prompt-embeds", str(prompt), "--out", str(tmp_path / "latents.safetensors")]
    assert main([*base, *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "latents.safetensors").exists()


def test_pickled_prompt_is_not_run(bundle, tmp_path, capsys):
    class Bomb:
        def __reduce__(self):
            return (Path(tmp_path / "bomb").touch, ())

    np.save(tmp_path / "prompt.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    torch.save(Bomb(), tmp_path / "prompt.pt")
    for name in ("prompt.npy", "prompt.pt"):
        flags = [str(bundle), "--prompt-embeds", str(tmp_path / name), "--out", str(tmp_path / "latents.safetensors")]
        assert main(["generate", *flags]) == 2
        assert "holds no plain tensor" in capsys.readouterr().err
    assert not (tmp_path / "bomb").exists()


def test_compare(capsys):
    flags = ["--recorded", str(GOLDEN / "D.safetensors"), "--executor", "eager", "--world-size", "2", "--json"]
    assert main(["compare", *flags]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["max_abs_error"]) == {"flow", "x0", "latents"}
    assert 0 < max(result["max_abs_error"].values()) <= result["tolerance"] == 5e-5
    assert (result["executor"], result["world_size"], result["passed"]) == ("eager", 2, True)


def test_compare_fails_on_other_numbers(tmp_path, capsys):
    with safe_open(GOLDEN / "D.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    tensors["out.c3.s2.flow"][0, 0, 7, 2, 1] += 1e-3
    save_file(tensors, tmp_path / "other.safetensors", metadata)
    assert main(["compare", "--recorded", str(tmp_path / "other.safetensors"), "--executor", "eager"]) == 1
    printed = capsys.readouterr().out
    assert "FAILED" in printed
    assert "out.c3.s2.flow" in printed


def test_compare_says_what_it_does_not_know(tmp_path, capsys):
    with safe_open(GOLDEN / "N1.safetensors", framework="pt") as file:
        metadata = file.metadata()
    metadata["config"] = json.dumps(json.loads(metadata["config"]) | {"patch_size": [2, 2, 2]})
    save_file({}, tmp_path / "patch.safetensors", metadata)
    assert main(["compare", "--recorded", str(tmp_path / "patch.safetensors")]) == 2
    assert "a patch of 2 latent frames is not known" in capsys.readouterr().err


def test_compare_refuses_what_is_no_recording(tmp_path, capsys):
    shutil.copy(GOLDEN / "D.safetensors", tmp_path / "cut.safetensors")
    with (tmp_path / "cut.safetensors").open("r+b") as file:
        file.truncate(100_000)
    assert main(["compare", "--recorded", str(tmp_path / "cut.safetensors")]) == 2
    assert "no recorded rollout" in capsys.readouterr().err


def test_doctor(capsys):
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["can"]["build and run onnxruntime"]["ok"]


def test_doctor_outlives_a_driver_that_is_too_old_for_torch(tmp_path):
    """In processes of their own, with torch's functions replaced in both; the child that tries CUDA finds them, too."""
    (tmp_path / "sitecustomize.py").write_text(
        textwrap.dedent(
            """
            import torch

            def refuse(*arguments):
                raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020). Please update it")

            torch.version.cuda = "13.0"
            torch.cuda.device_count = lambda: 8
            torch.cuda.init = torch.cuda.get_device_name = refuse
            """
        )
    )
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 535.161.08\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    paths = os.pathsep.join([str(tmp_path), python_environment()["PYTHONPATH"]])
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, "-m", "causalrt.cli", "doctor"], env=environment, capture_output=True, text=True, timeout=300
    )
    said = " ".join(done.stdout.split())
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert "8 GPUs by NVML, and CUDA does not start: The NVIDIA driver on your system is too old" in said
    assert re.search(r"driver [\d.]+, torch's CUDA 13\.0 needs driver 580 or newer", said)
    assert "\x1b" not in done.stdout


def test_doctor_says_what_its_exit_code_means(capsys):
    assert main(["doctor", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "exit code: 0, or 1 if this machine has NVIDIA GPUs and CUDA does not work on all of them" in shown


@pytest.fixture
def quota_of_five(tmp_path, monkeypatch):
    """A machine with 64 processors and 64 GiB, of which control groups grant five and a half and 2 GiB."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/job\n")
    (tmp_path / "proc/self/mountinfo").write_text("30 23 0:26 / /cgroup rw - cgroup2 cgroup2 rw\n")
    (tmp_path / "cgroup/job").mkdir(parents=True)
    (tmp_path / "cgroup/cpu.max").write_text("550000 100000\n")
    for name, text in (("max", 2 * 2**30), ("current", 2**29), ("stat", "inactive_file 0")):
        (tmp_path / f"cgroup/job/memory.{name}").write_text(f"{text}\n")
    monkeypatch.setattr(control_groups, "ROOT", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))


def test_doctor_shows_the_limits_of_control_groups(quota_of_five, capsys):
    assert main(["doctor", "--json"]) == 0
    machine = json.loads(capsys.readouterr().out)["machine"]
    assert (machine["cores"], machine["cpu_quota"], machine["threads"]) == (64, 5.5, 5)
    assert (machine["memory_limit_gib"], machine["memory_available_gib"]) == (2.0, 1.5)


def test_ranks_share_the_threads_that_a_quota_allows(bundle, quota_of_five):
    with causalrt.load(bundle) as engine:
        assert engine.num_threads == 2


@pytest.mark.parametrize(("axis", "pixels", "latents"), [("height", 480, 60), ("width", 832, 104)])
def test_pixels_given_for_latents_are_asked_about(checkpoint, tmp_path, capsys, axis, pixels, latents):
    flags = ["--recipe", "tiny", "--checkpoint", str(checkpoint), "--out", str(tmp_path / "b")]
    assert main(["build", *flags, "--set", f"video.latent_{axis}={pixels}"]) == 2
    said = capsys.readouterr().err
    assert f"latents of 8 pixels, so {pixels} of them are {8 * pixels} pixels" in said
    assert f"--set video.latent_{axis}={latents}" in said


@pytest.mark.parametrize("flags", [["--threads", "0"], ["--timeout", "1e10"], ["--timeout", "0"]])
def test_generate_refuses_numbers_out_of_range(bundle, tmp_path, capsys, flags):
    np.save(tmp_path / "prompt.npy", np.zeros((5, recipe("tiny").model.text_dim), np.float32))
    base = [
        "generate",
        str(bundle),
        "--prompt-embeds",
        str(tmp_path / "prompt.npy"),
        "--out",
        str(tmp_path / "o.safetensors"),
    ]
    assert main([*base, *flags]) == 2
    assert "must" in capsys.readouterr().err


def test_generate_does_not_replace_a_device(bundle, tmp_path, capsys):
    np.save(tmp_path / "prompt.npy", np.zeros((5, recipe("tiny").model.text_dim), np.float32))
    os.mkfifo(tmp_path / "pipe.safetensors")
    flags = [str(bundle), "--prompt-embeds", str(tmp_path / "prompt.npy"), "--out", str(tmp_path / "pipe.safetensors")]
    assert main(["generate", *flags]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_files_follow_the_umask(bundle):
    modes = {path.name: path.stat().st_mode & 0o777 for path in bundle.iterdir()}
    assert set(modes.values()) == {0o666 & ~_umask()}, modes


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("name", ["out.latents", "out.c1.s2.flow", "out.c5.ctx.flow"])
def test_compare_names_missing_outputs(tmp_path, capsys, name):
    with safe_open(GOLDEN / "D.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys() if key != name}  # noqa: SIM118
        save_file(tensors, tmp_path / "less.safetensors", file.metadata())
    assert main(["compare", "--recorded", str(tmp_path / "less.safetensors")]) == 2
    assert name in capsys.readouterr().err


def test_closed_pipe_is_no_error(bundle):
    command = (
        f"{shlex.quote(sys.executable)} -m causalrt.cli inspect {shlex.quote(str(bundle))} --json; echo code $? >&2"
    )
    done = subprocess.run(["bash", "-c", f"( {command} ) | true"], capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr
    assert done.stderr.strip() in ("code 141", "code 0")
