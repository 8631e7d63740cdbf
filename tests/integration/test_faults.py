"""Unhappy paths with real processes: what breaks, what the caller gets, and what is left behind (nothing)."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.memory_faults import run_out_of_memory
from support.small_bundles import Bundles, bundle_factory, num_steps, prompt, tiny_config, write_checkpoint
from support.tolerances import WHOLE_MODEL

from causalrt import Engine, Session, build, load
from causalrt.engines import bundle as bundle_module
from causalrt.errors import (
    BuildError,
    BundleError,
    CapacityError,
    CheckpointError,
    EngineClosedError,
    ExecutorError,
    OutOfMemoryError,
    PromptError,
    RankError,
    RequestError,
)
from causalrt.runtime import load as load_module
from causalrt.runtime import memory, ranks
from causalrt.runtime.messages import ChunkCommand, OpenCommand, packed
from causalrt.runtime.noise import SeededNoise

LONG = num_steps(240)
"""A chunk of a second or more, to break something in its middle."""
LONG_REFRESH = {"video.latent_height": "80", "video.latent_width": "120", **num_steps(1)}
"""What follows a chunk takes some tenths of a second."""
SECONDS_TO_FAIL = 10.0


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    return bundle_factory(tmp_path_factory.mktemp("bundles"))


@pytest.fixture(autouse=True)
def own_temporary_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Where the engines of a test keep their files; nothing may be left there."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield folder
    ours = list(folder.glob("causalrt-*"))  # torch's exporter keeps a cache there too
    assert ours == [], "an engine has left something in the temporary folder"


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused before anything is started."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("rank processes were started")

    monkeypatch.setattr("causalrt.runtime.workers.RankPool", refuse)


def supervisor(engine: Engine) -> int:
    """The process that forked the ranks; all of them are in its session."""
    return engine.workers.ranks._process.pid


def processes(session: int) -> list[str]:
    """Every process of a session, zombies included, as (pid, name, state, ...)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except OSError:
            continue
        if int(text.rpartition(")")[2].split()[3]) == session:
            found.append(text[:80])
    return found


def wait_until(condition: Callable[[], bool], timeout_s: float = SECONDS_TO_FAIL) -> bool:
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def all_latents(session: Session) -> torch.Tensor:
    return torch.cat([chunk.latents for chunk in session])


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


class Background(threading.Thread):
    """A call in a thread, with what it raised."""

    def __init__(self, call: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self.call = call
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.call()
        except BaseException as error:
            self.error = error

    def expect(self, kind: type[BaseException], timeout_s: float = SECONDS_TO_FAIL) -> Any:
        """What the call raised, which must be exactly a `kind` and within the time."""
        self.join(timeout_s)
        assert not self.is_alive(), f"no {kind.__name__} within {timeout_s} s"
        assert type(self.error) is kind, repr(self.error)
        return self.error


# Bundles that cannot be loaded


def damage_truncate(folder: Path) -> str:
    weights = folder / "weights.safetensors"
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size - 4096)
    return r"weights\.safetensors: [\d,]+ bytes, expected"


def damage_tamper(folder: Path) -> str:
    with (folder / "weights.safetensors").open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        byte = file.read(1)
        file.seek(-5, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    return "sha256"


def damage_missing(folder: Path) -> str:
    (folder / "weights.safetensors").unlink()
    return "weights.safetensors: missing"


def damage_link(folder: Path) -> str:
    (folder / "weights.safetensors").unlink()
    (folder / "weights.safetensors").symlink_to(folder / "elsewhere")
    return "a link to nothing"


def damage_manifest(folder: Path) -> str:
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text()[:-40])
    return "cannot be read"


def damage_world_size(folder: Path) -> str:
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"world_size": 2', '"world_size": 3'))
    return "changed after the build"


def damage_no_manifest(folder: Path) -> str:
    (folder / "manifest.json").unlink()
    return "is no bundle"


@pytest.mark.usefixtures("no_processes")
@pytest.mark.parametrize(
    "damage",
    [
        damage_truncate,
        damage_tamper,
        damage_missing,
        damage_link,
        damage_manifest,
        damage_world_size,
        damage_no_manifest,
    ],
)
def test_damaged_bundle_is_refused(bundles: Bundles, tmp_path: Path, damage: Callable[[Path], str]) -> None:
    copy = Path(shutil.copytree(bundles(2), tmp_path / "copy"))
    with pytest.raises(BundleError, match=damage(copy)):
        load(copy)


@pytest.mark.usefixtures("no_processes")
def test_wrong_world_size_and_executor_are_refused(bundles: Bundles, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"built for 2 rank\(s\), not 3; load it with world_size=2"):
        load(bundles(2), world_size=3)
    with pytest.raises(BundleError, match="build again with `--executor onnxruntime`"):
        load(bundles(2), executor="onnxruntime")
    with pytest.raises(ExecutorError, match="no executor 'nonesuch'"):
        load(bundles(2), executor="nonesuch")
    with pytest.raises(BundleError, match="is no bundle"):
        load(tmp_path / "nowhere")
    for timeout_s in (0, -1, float("inf"), float("nan")):
        with pytest.raises(RequestError, match="timeout_s must lie in"):
            load(bundles(2), timeout_s=timeout_s)


@pytest.mark.usefixtures("no_processes")
@pytest.mark.parametrize(("device", "seconds"), [("cuda", 60.0), ("cpu", 600.0)])
def test_a_silent_rank_on_a_gpu_fails_sooner(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch, device: str, seconds: float
) -> None:
    """Nothing but this time ends a collective inside an engine; what is slow on GPUs is over once they are loaded."""
    limits: list[float] = []
    monkeypatch.setattr(load_module, "choose_device", lambda *arguments, **options: device)
    monkeypatch.setattr(load_module, "start_engine", lambda bundle, options: limits.append(options.timeout_s))
    load(bundles(1))
    load(bundles(1), timeout_s=7.0)
    assert limits == [seconds, 7.0]


def test_memory_is_refused_before_anything_is_started(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 2**10)
    with pytest.raises(OutOfMemoryError, match=r"2 rank\(s\) need 0\.\d\d GiB here and 0\.00 are free"):
        load(bundles(2))


# Requests that cannot be served


BAD_PROMPTS = {
    "wrong width": (torch.zeros(8, 23), r"must be \[rows, 24\], got \[8, 23\]"),
    "too many rows": (torch.zeros(9, 24), "1 to 8 rows, got 9"),
    "no rows": (torch.zeros(0, 24), "1 to 8 rows, got 0"),
    "NaN": (torch.full((2, 24), torch.nan), "48 values that are not finite"),
    "too large for float32": (torch.full((1, 24), 1e300, dtype=torch.float64), "24 values that are not finite"),
    "integers": (torch.zeros(8, 24, dtype=torch.int64), r"floating-point tensor, got torch\.int64"),
    "a batch": (torch.zeros(1, 8, 24), "a batch element is a session of its own"),
    "no tensor": ([[0.0] * 24], "floating-point tensor, got <class 'list'>"),
}


def test_bad_requests_leave_the_engine_alive(bundles: Bundles) -> None:
    with load(bundles(2)) as engine:
        before = all_latents(engine.session(prompt(), num_chunks=1))
        for embeds, message in BAD_PROMPTS.values():
            with pytest.raises(PromptError, match=message):
                engine.session(embeds)  # type: ignore[arg-type]
        for chunks in (0, -1, 5, 1.5):
            with pytest.raises(RequestError, match=rf"{chunks} chunks of 3 .*horizon is 12 latent frames \(4 chunks\)"):
                engine.session(prompt(), num_chunks=chunks)  # type: ignore[arg-type]
        for shape in ((4, 4, 18, 63), (4, 4, 17, 64), (4, 3, 18, 64), (3, 4, 18, 64), (18, 64)):
            with pytest.raises(RequestError, match=r"noise must be .*(not \[4, 18, 64\]|3 chunks, not 4)"):
                engine.session(prompt(), noise=torch.zeros(shape))
        for seed in (-1, 2**64, 1.5):
            with pytest.raises(RequestError, match="seed must be a whole number in"):
                engine.session(prompt(), seed=seed)  # type: ignore[arg-type]
        assert largest_difference(all_latents(engine.session(prompt(), num_chunks=1)), before) < WHOLE_MODEL


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle for onnxruntime, on one rank."""
    folder = tmp_path_factory.mktemp("compiled")
    weights = write_checkpoint(tiny_config(), folder / "weights.safetensors")
    return build(tiny_config(), checkpoint=weights, out=folder / "bundle")


@pytest.mark.parametrize("executor", ["eager", "onnxruntime"])
def test_prompt_and_noise_as_they_come(executor: str, compiled: Path) -> None:
    """Straight from an encoder (with gradients), in half precision, or as views: no reason for a rank to fail."""
    embeds = prompt().half().float()
    noise = torch.randn(1, 4, 18, 64, generator=torch.Generator().manual_seed(0)).half().float()
    with load(compiled, executor=executor) as engine:
        expected = all_latents(engine.session(embeds, noise=noise, num_chunks=1))
        for given, drawn in (
            (embeds.clone().requires_grad_() * 1, noise.clone().requires_grad_() * 1),
            (embeds.half(), noise.half()),
            (embeds.T.contiguous().T, noise.flip(0).flip(0)),
            (torch.cat([embeds, embeds])[:8], torch.cat([noise, noise])[1:]),
        ):
            got = all_latents(engine.session(given, noise=drawn, num_chunks=1))
            assert largest_difference(got, expected) < WHOLE_MODEL


# Builds that fail


def test_nan_in_the_checkpoint_leaves_nothing(tmp_path: Path) -> None:
    config = tiny_config()
    weights = load_file(write_checkpoint(config, tmp_path / "good.safetensors"))
    weights["model.blocks.1.ffn.0.weight"][3, 4] = torch.nan
    weights["model.head.head.bias"][0] = torch.inf
    save_file(weights, tmp_path / "bad.safetensors")
    place = tmp_path / "place"
    with pytest.raises(CheckpointError, match=r"(?s)blocks\.1\.ffn\.0\.weight: 1 of .*head\.head\.bias: 1 of"):
        build(config, checkpoint=tmp_path / "bad.safetensors", out=place / "bundle")
    assert list(place.iterdir()) == []


def test_build_predicts_that_the_disk_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config()
    weights = write_checkpoint(config, tmp_path / "weights.safetensors")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**20))
    place = tmp_path / "place"
    with pytest.raises(BuildError, match=r"no disk space: the bundle needs [\d,]+ bytes and .* has 1,048,576 free"):
        build(config, checkpoint=weights, out=place / "bundle")
    assert list(place.iterdir()) == []


BUILD_ON_A_FULL_DISK = """
import resource, sys
from pathlib import Path
from support.small_bundles import tiny_config
from causalrt import build
from causalrt.errors import BuildError

folder, stage, executor = Path(sys.argv[1]), sys.argv[2], sys.argv[3]

def fill_disk(at, done, total):
    if at == stage:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))

try:
    build(tiny_config(), checkpoint=folder / "weights.safetensors", out=folder / "place" / "bundle",
          executors=[executor], overwrite=True, on_progress=fill_disk)
except BuildError as error:
    print(error)
    sys.exit(7)
"""


def run_script(script: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("stage", "executor", "occupied"),
    [("weights", "eager", False), ("weights", "eager", True), ("prompt and time graph", "onnxruntime", False)],
)
def test_disk_fills_up_in_the_middle_of_a_build(tmp_path: Path, stage: str, executor: str, occupied: bool) -> None:
    """No file may grow past 10,000 bytes from some stage on; what was at the target stays, and nothing else."""
    config = tiny_config()
    write_checkpoint(config, tmp_path / "weights.safetensors")
    target = tmp_path / "place" / "bundle"
    if occupied:
        build(config, checkpoint=tmp_path / "weights.safetensors", out=target, executors=["eager"])
    script = run_script(BUILD_ON_A_FULL_DISK, str(tmp_path), stage, executor)
    output, _ = script.communicate(timeout=300)
    assert script.returncode == 7, output
    assert "too large" in output or "No space" in output
    assert list((tmp_path / "place").iterdir()) == ([target] if occupied else [])
    if occupied:
        bundle_module.open_bundle(target)


def test_failed_build_keeps_the_bundle_that_is_there(bundles: Bundles, tmp_path: Path) -> None:
    target = tmp_path / "place" / "bundle"
    shutil.copytree(bundles(2), target)
    weights = load_file(write_checkpoint(tiny_config(2), tmp_path / "weights.safetensors"))
    weights["model.head.head.bias"][0] = torch.nan
    save_file(weights, tmp_path / "bad.safetensors")
    with pytest.raises(CheckpointError):
        build(tiny_config(2), checkpoint=tmp_path / "bad.safetensors", out=target, overwrite=True)
    with pytest.raises(BuildError, match="exists already"):
        build(tiny_config(2), checkpoint=tmp_path / "weights.safetensors", out=target)
    bundle_module.open_bundle(target)
    assert list(target.parent.iterdir()) == [target]


def test_bundle_returns_if_its_replacement_cannot_be_moved_in(
    bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "place" / "bundle"
    shutil.copytree(bundles(2), target)
    rename = os.rename

    def fail(source: Path, destination: Path) -> None:
        if str(source).endswith(".partial"):
            raise OSError(5, "Input/output error")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", fail)
    weights = write_checkpoint(tiny_config(2), tmp_path / "weights.safetensors")
    with pytest.raises(BuildError, match="Input/output error"):
        build(tiny_config(2), checkpoint=weights, out=target, executors=["eager"], overwrite=True)
    bundle_module.open_bundle(target)
    assert list(target.parent.iterdir()) == [target]


def test_build_does_not_overwrite_a_bundle_that_appears_meanwhile(bundles: Bundles, tmp_path: Path) -> None:
    target = tmp_path / "place" / "bundle"

    def other_build(stage: str, done: int, total: int) -> None:
        if not target.exists():
            shutil.copytree(bundles(2), target)

    weights = write_checkpoint(tiny_config(), tmp_path / "weights.safetensors")
    with pytest.raises(BuildError):
        build(tiny_config(), checkpoint=weights, out=target, executors=["eager"], on_progress=other_build)
    assert bundle_module.open_bundle(target).config.build.world_size == 2
    assert list(target.parent.iterdir()) == [target]


def test_folder_that_is_no_bundle_is_not_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "place"
    target.mkdir()
    (target / "thesis.txt").write_text("years of work")
    weights = write_checkpoint(tiny_config(), tmp_path / "weights.safetensors")
    with pytest.raises(BuildError, match="is no bundle; it is not overwritten"):
        build(tiny_config(), checkpoint=weights, out=target, overwrite=True)
    assert [path.name for path in target.iterdir()] == ["thesis.txt"]


# Ranks that die, hang or raise


def next_in_background(session: Session) -> Background:
    """The next chunk, asked for by a thread, and by now in its middle."""
    chunk = Background(lambda: next(session))
    time.sleep(0.15)
    assert chunk.is_alive(), "the chunk should take longer: raise LONG"
    return chunk


def test_waiting_for_a_dead_engine_keeps_raising(bundles: Bundles) -> None:
    with load(bundles(2, LONG_REFRESH)) as engine:
        session = engine.session(prompt())
        next(session)
        os.kill(engine.rank_pids[1], signal.SIGKILL)
        with pytest.raises(RankError):
            engine.wait()
        with pytest.raises(EngineClosedError):
            engine.wait()


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_rank_killed_in_the_middle_of_a_chunk(bundles: Bundles, world_size: int) -> None:
    bundle = bundles(world_size, LONG)
    engine = load(bundle)
    before = all_latents(engine.session(prompt(), num_chunks=1))
    session = engine.session(prompt(), num_chunks=2)
    group = supervisor(engine)
    assert len(processes(group)) == world_size + 1

    chunk = next_in_background(session)
    os.kill(engine.rank_pids[1], signal.SIGKILL)
    error = chunk.expect(RankError)
    assert error.rank == 1, error
    assert "rank 1 has died" in str(error)
    assert f"rank 1 of {world_size} ready" in error.log_tail
    assert processes(group) == []
    with pytest.raises(EngineClosedError):
        next(session)
    with pytest.raises(EngineClosedError):
        engine.session(prompt())
    session.close()
    engine.close()

    with load(bundle) as engine:
        assert largest_difference(all_latents(engine.session(prompt(), num_chunks=1)), before) < WHOLE_MODEL


def test_rank_killed_while_nobody_is_waiting(bundles: Bundles) -> None:
    with load(bundles(3)) as engine:
        session = engine.session(prompt())
        next(session)
        group = supervisor(engine)
        os.kill(engine.rank_pids[2], signal.SIGKILL)
        with pytest.raises(RankError, match="rank 2 has died"):
            next(session)
        assert processes(group) == []


def test_supervisor_killed(bundles: Bundles) -> None:
    """The ranks go with it, by the kernel's hand."""
    with load(bundles(2)) as engine:
        session = engine.session(prompt())
        group = supervisor(engine)
        os.kill(group, signal.SIGKILL)
        with pytest.raises(RankError, match="has died"):
            all_latents(session)
        assert wait_until(lambda: not [p for p in processes(group) if ") Z " not in p])


def test_rank_that_hangs_in_a_chunk(bundles: Bundles) -> None:
    with load(bundles(2, LONG), timeout_s=3) as engine:
        session = engine.session(prompt(), num_chunks=1)
        group = supervisor(engine)
        chunk = next_in_background(session)
        start = time.monotonic()
        os.kill(engine.rank_pids[1], signal.SIGSTOP)
        error = chunk.expect(RankError)
        assert time.monotonic() - start < 3 + 2
        assert "3 s (timeout_s)" in str(error) or "Timed out waiting 3000ms" in str(error)
        assert processes(group) == []


def test_rank_that_hangs_before_a_large_command(bundles: Bundles) -> None:
    """The command does not fit the socket's buffer; the caller must not wait for it forever."""
    with load(bundles(2, num_steps(100)), timeout_s=3) as engine:
        group = supervisor(engine)
        os.kill(engine.rank_pids[1], signal.SIGSTOP)
        noise = torch.zeros(4, 100, 18, 64)
        error = Background(lambda: engine.session(prompt(), noise=noise)).expect(RankError)
        assert error.rank == 1
        assert "3 s (timeout_s)" in str(error)
        assert processes(group) == []


CALLER = """
import sys, torch
from support.small_bundles import prompt
from causalrt import load
engine = load(sys.argv[1])
session = engine.session(prompt())
if sys.argv[2] == "idle":
    next(session)
print(engine.workers.ranks._process.pid, flush=True)
for _ in session if sys.argv[2] == "chunk" else sys.stdin:
    pass
"""


@pytest.mark.parametrize("when", ["chunk", "idle"])
def test_caller_killed(bundles: Bundles, when: str) -> None:
    """No rank outlives it for long, whether it is busy or waiting."""
    caller = run_script(CALLER, str(bundles(2, LONG if when == "chunk" else {})), when)
    assert caller.stdout is not None
    group = int(caller.stdout.readline())
    assert len(processes(group)) == 3
    time.sleep(0.2)
    caller.kill()
    caller.communicate()
    # Their supervisor reaps the ranks; the supervisor itself is reaped by whoever adopts it, not by us.
    assert wait_until(lambda: not [p for p in processes(group) if ") Z " not in p]), processes(group)


@pytest.mark.parametrize(("module", "name"), [("session_buffers", "KVSlots"), ("rank_server", "Rollout")])
def test_one_rank_without_memory_for_a_session_refuses_it(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, module: str, name: str
) -> None:
    """Before or after it has KV slots. The other rank, which has opened the session, frees it, and all goes on."""

    def latents(session: Session) -> list[torch.Tensor]:
        return [chunk.latents for chunk in session]

    with load(bundles(2)) as engine:
        wanted = {seed: latents(engine.session(prompt(), seed=seed)) for seed in (1, 2)}
    full = run_out_of_memory(monkeypatch, tmp_path, module, name, rank=1)
    with load(bundles(2)) as engine:
        open_one = engine.session(prompt(), seed=1)
        made, pids = [next(open_one).latents], engine.rank_pids
        full.touch()
        for _ in range(2):
            with pytest.raises(
                CapacityError, match=r"^rank 1 has no memory for a further session \(CUDA out of memory.*GiB\.\)"
            ):
                engine.session(prompt(), seed=2)
            assert engine.open_sessions == 1
        made.append(next(open_one).latents)
        full.unlink()
        assert all(map(torch.equal, latents(engine.session(prompt(), seed=2)), wanted[2]))
        assert all(map(torch.equal, [*made, *latents(open_one)], wanted[1]))
        assert all(map(torch.equal, latents(engine.session(prompt(), seed=1)), wanted[1]))
        assert engine.open_sessions == 0
        assert engine.rank_pids == pids


def test_error_inside_a_rank_arrives_with_its_log(bundles: Bundles) -> None:
    with load(bundles(2)) as engine:
        group = supervisor(engine)
        with pytest.raises(RankError) as caught:
            engine.workers.run(OpenCommand(session=99, text=torch.zeros(8, 5), noise=SeededNoise(0)))
        assert "raised RuntimeError: mat1 and mat2 shapes cannot be multiplied (8x5 and 24x48)" in str(caught.value)
        assert "encode_prompt" in caught.value.log_tail
        assert processes(group) == []


def test_first_rank_to_raise_is_the_one_that_is_named(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others fail in their collectives a moment later, and all of it may be in the channels by then."""
    with load(bundles(3)) as engine:
        session = engine.session(prompt())
        pool = engine.workers.ranks
        chunk = ChunkCommand(session=session.number, index=0, frame=0, context_pass=True, record=False)
        (wrong,) = packed(OpenCommand(session=9, text=torch.zeros(8, 5), noise=SeededNoise(0)))
        last = pool._channels[2]
        send_bytes = last.send_bytes
        monkeypatch.setattr(last, "send_bytes", lambda part: send_bytes(wrong))
        pool.send(chunk)
        time.sleep(0.5)
        with pytest.raises(RankError) as caught:
            list(pool.replies())
        assert caught.value.rank == 2
        assert "(8x5 and 24x48)" in str(caught.value)


def test_typed_error_of_a_rank_keeps_its_type(compiled: Path, tmp_path: Path) -> None:
    """A rank that cannot load says so with an ExecutorError, not with a RankError."""
    bundle = Path(shutil.copytree(compiled, tmp_path / "bundle"))
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["toolchain"]["onnxruntime"] = "99.0"
    manifest["digest"] = bundle_module.record_digest(manifest)
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ExecutorError, match=r"built with onnxruntime 99\.0"):
        load(bundle, executor="onnxruntime")


def test_interrupt_while_waiting_for_a_chunk(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever Ctrl-C strikes, no later request may read the answers to the one that it broke off."""
    for place in ("wait", "receive", "packed"):
        with load(bundles(1)) as engine:
            session = engine.session(prompt())
            group = supervisor(engine)
            with monkeypatch.context() as patch:

                def interrupt(*args: object, **kwargs: object) -> None:
                    raise KeyboardInterrupt

                patch.setattr(ranks, place, interrupt)
                with pytest.raises(KeyboardInterrupt):
                    next(session)
            assert processes(group) == []
            with pytest.raises(EngineClosedError):
                next(session)


# Closing


def test_close(bundles: Bundles) -> None:
    engine = load(bundles(2))
    group = supervisor(engine)
    open_session = engine.session(prompt())
    begun = engine.session(prompt())
    next(begun)
    engine.close()
    assert processes(group) == []
    engine.close()
    open_session.close()
    begun.close()
    for call in (lambda: next(open_session), lambda: next(begun), lambda: engine.session(prompt())):
        with pytest.raises(EngineClosedError):
            call()
    with pytest.raises(EngineClosedError):
        engine.rank_pids  # noqa: B018


def test_close_in_the_middle_of_a_chunk(bundles: Bundles) -> None:
    engine = load(bundles(2, LONG))
    group = supervisor(engine)
    chunk = next_in_background(engine.session(prompt()))
    start = time.monotonic()
    engine.close()
    assert time.monotonic() - start < 3
    chunk.expect(EngineClosedError)
    assert processes(group) == []


def test_forgotten_engine_ends_its_ranks(bundles: Bundles) -> None:
    engine = load(bundles(2))
    group = supervisor(engine)
    del engine
    gc.collect()
    assert processes(group) == []


def test_engine_outlives_the_thread_that_loaded_it(bundles: Bundles) -> None:
    """The kernel's parent-death signal comes at the end of the parent's thread, not of its process."""
    loaded: list[Engine] = []
    thread = threading.Thread(target=lambda: loaded.append(load(bundles(2))))
    thread.start()
    thread.join()
    time.sleep(0.2)
    with loaded[0] as engine:
        assert all_latents(engine.session(prompt())).shape[0] == 12


def test_ranks_import_what_their_caller_imports(
    bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a module that lies about in the working directory nor a path known to the caller alone may matter."""
    bundle = bundles(1)
    (tmp_path / "torch.py").write_text("raise SystemExit('the wrong torch')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with load(bundle) as engine:
        assert all_latents(engine.session(prompt(), num_chunks=1)).shape[0] == 3


def test_ranks_import_from_a_folder_with_a_colon_in_its_name(bundles: Bundles, tmp_path: Path) -> None:
    package = tmp_path / "job:1" / "causalrt"
    shutil.copytree(Path(ranks.__file__).parents[1], package, ignore=shutil.ignore_patterns("__pycache__"))
    worker = package / "runtime" / "worker.py"
    worker.write_text(
        worker.read_text().replace("import argparse\n", "import argparse\nopen(__file__ + '.ran', 'w')\n", 1)
    )
    script = "import sys; sys.path.insert(0, sys.argv[1]); import causalrt; causalrt.load(sys.argv[2]).close()"
    done = subprocess.run(
        [sys.executable, "-c", script, str(package.parent), str(bundles(1))],
        stderr=subprocess.PIPE,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert worker.with_name("worker.py.ran").exists()


def test_fork_of_the_caller_does_not_end_its_ranks(bundles: Bundles) -> None:
    with load(bundles(2)) as engine:
        pid = os.fork()
        if pid == 0:
            engine.workers.ranks.close(kill=True)
            os._exit(0)
        os.waitpid(pid, 0)
        assert all_latents(engine.session(prompt())).shape[0] == 12


def test_nothing_leaks(bundles: Bundles) -> None:
    def held() -> tuple[int, int]:
        gc.collect()
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    def cycle() -> None:
        with load(bundles(1)) as engine:
            all_latents(engine.session(prompt(), num_chunks=1))
        engine = load(bundles(2))
        os.kill(engine.rank_pids[0], signal.SIGKILL)
        with pytest.raises(RankError):
            engine.session(prompt())

    cycle()
    before = held()
    cycle()
    assert held() == before


# Sessions beside and after each other


def whole_video(engine: Engine, seed: int) -> torch.Tensor:
    return all_latents(engine.session(prompt(seed), seed=seed))


def test_interleaved_sessions_equal_single_ones(bundles: Bundles) -> None:
    with load(bundles(2)) as engine:
        expected = [whole_video(engine, seed) for seed in (1, 2)]
        assert largest_difference(*expected) > 0.5
        sessions = [engine.session(prompt(seed), seed=seed) for seed in (1, 2)]
        chunks = [[chunk.latents for chunk in pair] for pair in zip(*sessions, strict=True)]
        for which in (0, 1):
            assert largest_difference(torch.cat([pair[which] for pair in chunks]), expected[which]) < WHOLE_MODEL

        together: dict[int, torch.Tensor] = {}

        def run(seed: int) -> None:
            together[seed] = whole_video(engine, seed)

        for thread in [Background(lambda seed=seed: run(seed)) for seed in (1, 2)]:  # type: ignore[misc]
            thread.join()
        for which, seed in enumerate((1, 2)):
            assert largest_difference(together[seed], expected[which]) < WHOLE_MODEL


def test_cancelled_session_leaves_no_trace(bundles: Bundles) -> None:
    """Closed while its context pass runs, between chunks, or dropped without a word: the next one starts clean."""
    with load(bundles(2)) as engine:
        expected = whole_video(engine, 1)
        with engine.session(prompt(2), seed=2) as session:
            next(session)
            next(session)
        with pytest.raises(EngineClosedError, match="session was closed"):
            next(session)
        assert largest_difference(whole_video(engine, 1), expected) < WHOLE_MODEL

        running = engine.session(prompt(1), seed=1)
        first = next(running).latents
        engine.session(prompt(2), seed=2).close()
        next(engine.session(prompt(3), seed=3))
        rest = all_latents(running)
        assert largest_difference(torch.cat([first, rest]), expected) < WHOLE_MODEL


def test_dropped_sessions_are_freed(bundles: Bundles) -> None:
    """`break` out of a loop over a session, and its KV slots must not stay for the life of the engine."""
    changes = {"video.latent_height": "40", "video.latent_width": "60"}
    changes |= {"video.window_frames": "none", "video.horizon_frames": "120"}
    config = tiny_config(1, changes)
    slots_bytes = memory.predict_memory(config, "eager").kv_bytes
    with load(bundles(1, changes)) as engine:

        def virtual_bytes() -> int:
            status = Path(f"/proc/{engine.rank_pids[0]}/status").read_text()
            return 1024 * int(status.split("VmSize:")[1].split()[0])

        for _ in range(2):
            engine.session(prompt())
        before = virtual_bytes()
        for _ in range(8):
            engine.session(prompt())
        assert virtual_bytes() - before < 2 * slots_bytes


def test_same_seed_gives_the_same_video_on_any_number_of_ranks(bundles: Bundles) -> None:
    """3 heads, 18 tokens: 2 ranks cut a head, 8 are more than the heads and leave two ranks without a token."""
    videos = {}
    for world_size in (1, 2, 3, 8):
        with load(bundles(world_size)) as engine:
            videos[world_size] = whole_video(engine, 5)
    for world_size, video in videos.items():
        assert largest_difference(video, videos[1]) < WHOLE_MODEL, world_size
