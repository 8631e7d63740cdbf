"""Load and abuse of a server, with figures: many clients at once, a reader that stalls, a client that vanishes in mid-chunk.

    python benchmarks/serve_load.py --url http://127.0.0.1:8000 --clients 50
    python benchmarks/serve_load.py --bundle bundle --text-encoder Wan2.1-T2V-1.3B --clients 50 --json

Half of the clients ask for a file, half of them stream. Each is served, or refused with 429 or 503 and a time to come back;
one that is neither is lost, and the exit code is 1. So it is if a reader that stalls (`--stall`) is not ended as `stalled`.
Wants `pip install '.[test]'`.
"""

import argparse
import asyncio
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import httpx
from websockets.asyncio.client import connect

POLL_S = 0.05
WAIT_S = 600.0
STALLED = 'causalrt_generations_total{kind="realtime",reason="stalled"}'


class Target:
    """The server under load."""

    def __init__(self, url: str, token: str | None) -> None:
        self.url = url
        self.headers = {"Authorization": f"Bearer {token}"} if token else {}
        limits = httpx.Limits(max_connections=200)
        # Proxies of the environment are ignored, since the server is measured.
        self.http = httpx.AsyncClient(
            base_url=url, headers=self.headers, timeout=WAIT_S, limits=limits, trust_env=False
        )

    def realtime(self, **how: Any) -> connect:
        """Open a WebSocket to the server."""
        url = self.url.replace("http", "ws", 1) + "/v1/realtime"
        return connect(url, compression=None, proxy=None, additional_headers=self.headers, max_size=2**26, **how)

    async def metric(self, name: str) -> float:
        """One line of its metrics; 0 if it is not there, as counters before they count."""
        lines = (await self.http.get("/metrics")).text.splitlines()
        return next((float(line.rpartition(" ")[2]) for line in lines if line.rpartition(" ")[0] == name), 0.0)

    async def sessions_ended(self) -> float:
        """Seconds until no session is open."""
        begun = time.perf_counter()
        while await self.metric("causalrt_sessions"):
            await asyncio.sleep(POLL_S / 5)
        return time.perf_counter() - begun


async def one_job(target: Target, number: int, seconds: float) -> dict[str, Any]:
    """A client that wants a file."""
    begun = time.perf_counter()
    answer = await target.http.post("/v1/videos", json={"prompt": "a fox runs", "seed": number, "seconds": seconds})
    if answer.status_code in (429, 503):
        return {"outcome": "refused" if int(answer.headers.get("retry-after", 0)) > 0 else "lost"}
    if answer.status_code != 200:
        return {"outcome": "lost", "why": answer.text}
    while (video := (await target.http.get(f"/v1/videos/{answer.json()['id']}")).json())["status"] != "completed":
        if video["status"] == "failed":
            return {"outcome": "lost", "why": video["error"]["message"]}
        await asyncio.sleep(POLL_S)
    content = (await target.http.get(f"/v1/videos/{video['id']}/content")).content
    with av.open(io.BytesIO(content), "r") as container:
        frames = sum(1 for _ in container.decode(video=0))
    await target.http.delete(f"/v1/videos/{video['id']}")
    return {"outcome": "served" if frames else "lost", "whole_s": time.perf_counter() - begun}


async def one_stream(target: Target, number: int, chunks: int) -> dict[str, Any]:
    """A client that watches."""
    begun = time.perf_counter()
    first: dict[str, Any] | None = None
    seen = 0
    async with target.realtime() as socket:
        async for message in socket:
            if isinstance(message, bytes):
                continue
            event = json.loads(message)
            if event["type"] == "ready":
                start = {"type": "start", "prompt": "a fox runs", "seed": number, "chunks": chunks}
                await socket.send(json.dumps(start))
            elif event["type"] == "chunk":
                first = first or event
                seen += 1
            elif event["type"] == "error":
                return {"outcome": "refused" if event["retry_after_s"] else "lost", "why": event["message"]}
            elif event["type"] == "ended":
                break
    if first is None or seen != chunks:
        return {"outcome": "lost", "why": f"{seen} of {chunks} chunks came"}
    return {
        "outcome": "served",
        "whole_s": time.perf_counter() - begun,
        "first_frame_s": first["first_frame_ms"] / 1e3,
        "first_chunk_s": first["latency_ms"] / 1e3,
    }


async def many_at_once(target: Target, clients: int, chunks: int, seconds: float) -> dict[str, Any]:
    """All of them at the same time."""
    limit, most = await target.metric("causalrt_sessions_limit"), 0.0
    begun = time.perf_counter()
    work = [
        one_job(target, number, seconds) if number % 2 else one_stream(target, number, chunks)
        for number in range(clients)
    ]
    tasks = [asyncio.create_task(coroutine) for coroutine in work]
    while not all(task.done() for task in tasks):
        most = max(most, await target.metric("causalrt_sessions"))
        await asyncio.sleep(POLL_S)
    results = [task.result() for task in tasks]
    outcomes = Counter(result["outcome"] for result in results)
    found: dict[str, Any] = {
        "clients": clients,
        "sessions_limit": int(limit),
        "most_sessions": int(most),
        **{name: outcomes[name] for name in ("served", "refused", "lost")},
        "wall_s": time.perf_counter() - begun,
        "lost_because": [result.get("why") for result in results if result["outcome"] == "lost"],
    }
    for name in ("first_chunk_s", "first_frame_s", "whole_s"):
        values = sorted(result[name] for result in results if name in result)
        if values:
            found[name] = {"median": values[len(values) // 2], "p90": values[9 * len(values) // 10], "max": values[-1]}
    return found


async def stalled_reader(target: Target) -> dict[str, Any]:
    """A client that starts, and reads nothing more: the generator waits, then its session goes to others.

    The server has to have ended it as `stalled`: a video that is done frees its session, too.
    """
    before = await target.metric(STALLED)
    async with target.realtime(max_queue=1) as socket:
        await socket.recv()
        transport = socket.transport
        await socket.send(json.dumps({"type": "start", "prompt": "a fox runs", "chunks": None}))
        transport.pause_reading()
        begun = time.perf_counter()
        while not await target.metric("causalrt_sessions"):
            await asyncio.sleep(POLL_S)
        await target.sessions_ended()
        freed_s = time.perf_counter() - begun
        stalled = await target.metric(STALLED) > before
        transport.abort()
    return {"session_free_after_s": freed_s, "ended_as_stalled": stalled}


async def vanishing_client(target: Target) -> dict[str, Any]:
    """A client whose connection breaks while a chunk is made."""
    async with target.realtime() as socket:
        chunk: dict[str, Any] = {}
        await socket.send(json.dumps({"type": "start", "prompt": "a fox runs", "chunks": None}))
        while chunk.get("type") != "chunk":
            message = await socket.recv()
            chunk = json.loads(message) if isinstance(message, str) else {}
        socket.transport.abort()
    return {"session_free_after_s": await target.sessions_ended(), "chunk_s": chunk["latency_ms"] / 1e3}


async def measure(url: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """All cases, one after the other."""
    target = Target(url, arguments.token)
    async with target.http:
        (await target.http.get("/readyz")).raise_for_status()
        await one_stream(target, 0, 1)  # work that is done once is not measured
        found = {
            "many_at_once": await many_at_once(target, arguments.clients, arguments.chunks, arguments.seconds),
            "vanishing_client": await vanishing_client(target),
        }
        if arguments.stall:
            found["stalled_reader"] = await stalled_reader(target)
        return found


@contextmanager
def own_server(arguments: argparse.Namespace) -> Iterator[str]:
    """Run a server on a free port until SIGTERM; it is an error if it does not end with code 0."""
    command = [sys.executable, "-m", "causalrt.cli", "serve", str(arguments.bundle), "--json", "--port", "0"]
    flags = ["--text-encoder", str(arguments.text_encoder), "--rate", "100000", *arguments.serve]
    with subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield json.loads(process.stdout.readline())["url"]
        finally:
            process.send_signal(signal.SIGTERM)
            code = process.wait(WAIT_S)
            if code:
                raise SystemExit(f"the server ended with code {code}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cases; the exit code is 0 if no client was lost and the stalled reader was detected."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--url", help="a server that runs")
    where.add_argument("--bundle", type=Path, help="start one of this bundle")
    parser.add_argument("--text-encoder", type=Path, help="with --bundle")
    parser.add_argument(
        "--serve", action="append", default=[], metavar="FLAG", help="with --bundle: a flag of causalrt serve"
    )
    parser.add_argument("--token", default=os.environ.get("CAUSALRT_TOKEN"), help="($CAUSALRT_TOKEN)")
    parser.add_argument("--clients", type=int, default=50, help="at once (50)")
    parser.add_argument("--chunks", type=int, default=3, help="that a streaming client wants (3)")
    parser.add_argument("--seconds", type=float, default=2.0, help="that the file of a job lasts (2)")
    parser.add_argument("--stall", action="store_true", help="have a reader stall, too: takes the server's --stall")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    if arguments.url:
        found = asyncio.run(measure(arguments.url, arguments))
    else:
        with own_server(arguments) as url:
            found = asyncio.run(measure(url, arguments))
    if arguments.json:
        print(json.dumps(found))
    else:
        for case, values in found.items():
            print(case)
            for name, value in values.items():
                shown = value
                if isinstance(value, dict):
                    shown = ", ".join(f"{key} {number:.3f}" for key, number in value.items())
                print(f"  {name:22} {shown:.3f}" if isinstance(shown, float) else f"  {name:22} {shown}")
    unnoticed = "stalled_reader" in found and not found["stalled_reader"]["ended_as_stalled"]
    return 1 if found["many_at_once"]["lost"] or unnoticed else 0


if __name__ == "__main__":
    sys.exit(main())
