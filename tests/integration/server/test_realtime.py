"""Real-time sessions over a WebSocket, against a fake engine."""

import contextlib
import io
import json
import re
import socket
import threading
import time

import av
import pytest
from support.fake_engine import FakeEngine
from support.running import DEADLINE_S, Running, until
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from causalrt.media.mp4_boxes import boxes
from causalrt.server import uvicorn_quirks
from causalrt.server.auth import Tokens


@pytest.fixture
def held():
    """A server whose chunks come when the test lets them."""
    engine = FakeEngine(max_sessions=1)
    engine.hold()
    with Running(engine) as running:
        yield running


@pytest.fixture(scope="module")
def server():
    with Running() as running:
        yield running


def drain(client):
    """Read until the connection ends."""
    with contextlib.suppress(OSError):
        while client.recv(65536):
            pass


@contextlib.contextmanager
def unread(server, *, upgrade=True):
    """A socket after its handshake (none without `upgrade`), with a small buffer; nothing reads it but the test."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(DEADLINE_S)
        client.connect((host, int(port)))
        if not upgrade:
            yield client
            return
        lines = ["GET /v1/realtime HTTP/1.1", f"Host: {host}:{port}", "Upgrade: websocket", "Connection: Upgrade"]
        lines += ["Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==", "Sec-WebSocket-Version: 13", "", ""]
        client.sendall("\r\n".join(lines).encode())
        assert client.recv(12) == b"HTTP/1.1 101"
        yield client


def frame(opcode, data):
    """A WebSocket frame of up to 125 bytes, masked with zeros."""
    return bytes([0x80 | opcode, 0x80 | len(data)]) + bytes(4) + data


def websockets_of(server):
    return [
        one for one in list(server.server.server_state.connections) if isinstance(one, uvicorn_quirks.RealtimeProtocol)
    ]


def frames_in(media):
    with av.open(io.BytesIO(b"".join(media))) as container:
        return [frame.pts * frame.time_base for frame in container.decode(video=0)]


def test_a_video_arrives_while_it_is_made(held):
    with held.realtime() as client:
        ready = client.ready
        assert (ready["width"], ready["height"], ready["fps"]) == (48, 32, 16)
        assert (ready["max_prompt_chars"], ready["max_chunks"]) == (2000, 7)
        client.start(seed=3, chunks=3)
        started = client.next("started")
        assert (started["seed"], started["chunks"]) == (3, 3)
        held.engine.let(1)
        first = client.next("chunk")
        assert (first["index"], first["frames"]) == (0, 9)
        assert set(first["stages"]) == {
            "queue",
            "text",
            "denoise",
            "exchange",
            "gather",
            "decode",
            "hand_over",
            "encode",
        }
        assert (first["stages"]["denoise"], first["stages"]["exchange"]) == (3.0, None)
        assert first["first_frame_ms"] > 0
        assert first["cold_ms"] > first["first_frame_ms"]  # the process was started before
        assert len(frames_in(client.media)) == 9
        held.engine.let(2)
        second = client.next("chunk")
        assert (second["index"], second["frames"]) == (1, 12)
        assert "first_frame_ms" not in second
        assert "text" not in second["stages"]
        ended = client.next("ended")
        assert (ended["reason"], ended["chunks"]) == ("done", 3)
        assert frames_in(client.media) == [number / 16 for number in range(33)]
        assert [name for name, _ in boxes(client.media[0])] == ["ftyp", "moov"]
        for part in client.media[1:]:
            assert [name for name, _ in boxes(part)] == ["moof", "mdat"]
        assert ready["mime"].startswith('video/mp4; codecs="avc1.')


def test_an_independent_first_frame_is_sent_at_once():
    """The first chunk is one frame, which has no other to wait for."""
    engine = FakeEngine(changes={"video.independent_first_frame": "true", "video.horizon_frames": "22"})
    engine.hold()
    with Running(engine) as server, server.realtime() as client:
        assert client.ready["max_chunks"] == 8
        client.start()
        engine.let(1)
        first = client.next("chunk")
        assert (first["frames"], first["first_frame_ms"] > 0) == (1, True)
        assert len(frames_in(client.media)) == 1
        engine.let(7)
        client.next("ended")
        assert len(frames_in(client.media)) == 1 + 7 * 12
        engine.let(10)
        job = server.finished(server.post(seconds=4).json()["id"])
        assert job["status"] == "completed"


def test_one_after_the_other_on_a_connection(server):
    with server.realtime() as client:
        for seed in range(3):
            client.media.clear()
            client.start(seed=seed, chunks=2)
            assert client.next("ended")["reason"] == "done"
            assert len(frames_in(client.media)) == 21
    until(lambda: server.engine.open_sessions == 0)


def test_without_a_number_the_horizon_is_filled(server):
    with server.realtime() as client:
        client.start()
        assert client.next("started")["chunks"] == 7
        assert client.next("ended")["chunks"] == 7


def test_a_bundle_without_an_end_goes_on_until_it_is_stopped():
    changes = {"video.time_index": "relative", "video.window_frames": "9"}
    with Running(FakeEngine(changes=changes)) as server, server.realtime() as client:
        assert client.ready["max_chunks"] is None
        client.start()
        assert client.next("started")["chunks"] is None
        client.next("chunk", index=40)
        client.send("stop")
        ended = client.next("ended")
        assert ended["reason"] == "stopped"
        assert ended["chunks"] > 40


def test_a_switch_acts_from_the_next_chunk_on(held):
    with held.realtime() as client:
        client.start()
        held.engine.let(2)
        client.next("chunk", index=1)
        client.send("switch", prompt="a bear", policy="recache")
        held.engine.let(1)  # the chunk that is under way
        switched = client.next("switched")
        assert (switched["from_chunk"], switched["policy"]) == (3, "recache")
        assert held.engine.switches == [(0, 3, "recache")]
        client.send("switch", prompt="unencodable")
        held.engine.let(1)
        assert client.next("error")["code"] == "bad_request"
        held.engine.let(5)
        assert client.next("ended")["chunks"] == 7


def test_pause_holds_the_generator_and_resume_goes_on(held):
    with held.realtime() as client:
        client.start()
        held.engine.let(1)
        client.next("chunk")
        client.send("pause")
        held.engine.let(5)
        client.next("paused")
        made = held.engine.made[0]
        time.sleep(0.2)
        assert held.engine.made[0] == made <= 3
        client.send("switch", prompt="a bear")  # may be asked for meanwhile
        client.next("switched")
        client.send("resume")
        client.next("resumed")
        held.engine.let(5)
        assert client.next("ended")["chunks"] == 7


def test_a_pause_does_not_last_for_ever():
    with Running(FakeEngine(max_sessions=1), pause_s=0.2) as server, server.realtime() as client:
        server.engine.hold()
        client.start()
        client.next("started")
        client.send("pause")
        server.engine.let(1)
        assert client.next("ended")["reason"] == "stalled"
        until(lambda: server.engine.open_sessions == 0)


def test_switches_do_not_prolong_a_pause():
    with Running(FakeEngine(max_sessions=1), pause_s=0.5) as server, server.realtime() as client:
        server.engine.hold()
        client.start()
        client.next("started")
        client.send("pause")
        client.send("pause")
        server.engine.let(1)
        until(
            lambda: server.engine.made.get(0) or not server.engine.open_sessions
        )  # on a busy machine the pause is over
        begun = time.monotonic()
        while server.engine.open_sessions:
            assert time.monotonic() < begun + DEADLINE_S, "the pause did not end"
            client.send("switch", prompt="a bear")
            time.sleep(0.1)
        assert client.next("ended")["reason"] == "stalled"


def test_stop_ends_before_the_next_chunk(held):
    with held.realtime() as client:
        client.start()
        held.engine.let(1)
        client.next("chunk")
        client.send("stop")
        held.engine.let(1)
        assert client.next("ended")["reason"] == "stopped"
        assert held.engine.made[0] == 2
        until(lambda: held.engine.open_sessions == 0)


def test_what_follows_a_stop_is_about_the_next_generation(held):
    """Sent back to back, in the middle of a chunk: nothing is lost, and nothing reaches the generation that ends."""
    with held.realtime() as client:
        client.start(seed=1)
        client.next("started")
        until(lambda: held.engine.begun, "the first chunk")
        client.send("stop")
        client.send("stop")  # once more changes nothing
        client.start(seed=2, chunks=2)
        client.send("switch", prompt="a bear")
        held.engine.let(1)
        assert client.next("ended")["reason"] == "stopped"
        assert client.next("started")["seed"] == 2
        client.next("switched")
        assert held.engine.switches == [(1, 0, "keep")]
        client.send("stop")
        client.start(seed=3)
        client.send("stop")
        client.start(seed=4, chunks=1)
        held.engine.let(10)
        ends = [client.next("ended") for _ in range(3)]
        assert [end["reason"] for end in ends] == ["stopped", "stopped", "done"]
        assert next(message["seed"] for message in reversed(client.seen) if message["type"] == "started") == 4
        assert [message for message in client.seen if message["type"] == "error"] == []


def test_a_stop_in_the_queue_and_a_start_behind_it(held):
    with held.realtime() as first, held.realtime() as second:
        first.start(chunks=1)
        first.next("started")
        second.start(seed=1)
        second.next("queued")
        second.send("stop")
        second.start(seed=2, chunks=1)
        assert second.next("ended") == {"type": "ended", "reason": "stopped", "chunks": 0}
        held.engine.let(10)
        assert second.next("ended")["reason"] == "done"
        assert next(message["seed"] for message in second.seen if message["type"] == "started") == 2


def test_a_client_that_leaves_takes_what_it_had_sent_behind_a_stop_with_it(held):
    with held.realtime() as client:
        client.start()
        until(lambda: held.engine.begun, "the first chunk")
        client.send("stop")
        client.start()
        until(lambda: held.services.generator.stopping, "stopping")
    held.engine.let(1)
    until(lambda: held.metric("causalrt_connections") == 0, "leaving")
    assert (held.engine.open_sessions, len(held.engine.sessions)) == (0, 1)


def test_waiting_clients_are_told_their_place(held):
    with held.realtime() as first, held.realtime() as second, held.realtime() as third:
        first.start(chunks=1)
        first.next("started")
        second.start(chunks=1)
        assert second.next("queued")["position"] == 1
        third.start(chunks=1)
        assert third.next("queued")["position"] == 2
        second.send("stop")
        assert second.next("ended") == {"type": "ended", "reason": "stopped", "chunks": 0}
        assert third.next("queued")["position"] == 1
        held.engine.let(2)
        assert first.next("ended")["reason"] == third.next("ended")["reason"] == "done"
        assert held.engine.most_open == 1


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        ("{", "JSON"),
        ("[]", "object"),
        ('{"type": "fly"}', "tag 'fly'"),
        ('{"type": "start"}', "prompt: Field required"),
        ('{"type": "start", "prompt": 1}', "prompt: Input should be a valid string"),
        ('{"type": "start", "prompt": ""}', "empty"),
        ('{"type": "start", "prompt": "\\u0000"}', "U[+]0000"),
        (json.dumps({"type": "start", "prompt": "x" * 2001}), "2000 characters"),
        ('{"type": "start", "prompt": "x", "chunks": 8}', "chunks must be 1 to 7"),
        ('{"type": "start", "prompt": "x", "chunks": 0}', "chunks must be 1 to 7"),
        ('{"type": "start", "prompt": "x", "seed": -1}', "seed: Input should be greater"),
        ('{"type": "start", "prompt": "x", "seed": "1"}', "seed: Input should be a valid integer"),
        ('{"type": "start", "prompt": "x", "more": 1}', "more: Extra inputs"),
        ('{"type": "pause"}', "no generation to pause"),
        ('{"type": "stop"}', "no generation to stop"),
        ('{"type": "switch", "prompt": "x"}', "no generation to switch"),
        (b"\x00", "JSON"),
    ],
)
def test_what_cannot_be_done_is_said_and_the_connection_stays(server, message, complaint):
    with server.realtime() as client:
        client.socket.send(message)
        error = client.next("error")
        assert error["code"] == "bad_request"
        assert re.search(complaint, error["message"])
        client.start(chunks=1)
        assert client.next("ended")["reason"] == "done"


def test_a_second_start_is_refused_and_the_first_goes_on(held):
    with held.realtime() as client:
        client.start(chunks=1)
        client.start(chunks=1)
        assert "already running" in client.next("error")["message"]
        held.engine.let(1)
        assert client.next("ended")["reason"] == "done"


def test_a_prompt_that_is_cut_is_told_in_each_answer(server):
    cut = [
        {
            "code": "prompt_cut",
            "message": "the prompt was cut: the model reads its first 64 tokens, and what comes after them has no effect",
            "param": "prompt",
        }
    ]
    with server.realtime() as client:
        for prompt, warnings in (("word " * 65, cut), ("word " * 65, cut), ("word " * 64, [])):
            client.start(prompt=prompt, chunks=7)
            assert client.next("started")["warnings"] == warnings
            client.send("stop")
            client.next("ended")


def test_a_prompt_that_is_cut_is_told_when_it_is_switched_to(held):
    with held.realtime() as client:
        client.start()
        assert client.next("started")["warnings"] == []
        client.send("switch", prompt="word " * 65)
        held.engine.let(2)
        assert "64 tokens" in client.next("switched")["warnings"][0]["message"]
        client.send("switch", prompt="a bear")
        held.engine.let(10)
        assert client.next("switched")["warnings"] == []
        client.next("ended")


def test_too_many_switches_are_refused(held):
    with held.realtime() as client:
        client.start()
        client.next("started")
        until(lambda: held.engine.begun == 1)  # or the first switch would be made at once
        for _ in range(5):
            client.send("switch", prompt="a bear")
        error = client.next("error")
        assert (error["code"], error["retry_after_s"]) == ("busy", 1)
        held.engine.let(10)
        client.next("ended")
        assert len(held.engine.switches) == 4


def test_a_message_that_is_too_big_ends_the_connection(server):
    with server.realtime() as client:
        client.socket.send("x" * 65_537)
        assert client.closed() == 1009


# ---- readers that are slow, stalled, or gone


def test_a_slow_reader_stops_the_generator_and_gets_every_frame():
    engine = FakeEngine(changes={"video.latent_height": "40", "video.latent_width": "60"})
    with Running(engine, send_buffer_bytes=4096) as server, server.realtime(max_queue=1) as client:
        client.start(chunks=7)
        client.next("started")
        made = until(lambda: (a := engine.made.get(0, 0)) and time.sleep(0.5) is None and engine.made[0] == a and a)
        assert made < 7  # it waits for the reader
        assert client.next("ended")["chunks"] == 7
        assert len(frames_in(client.media)) == 9 + 6 * 12
        assert server.metric("causalrt_dropped_frames_total") == 0


def test_a_stalled_reader_is_given_up_and_its_session_freed(monkeypatch):
    monkeypatch.setattr(uvicorn_quirks, "LINGER_S", 0.2)
    engine = FakeEngine(max_sessions=1, changes={"video.latent_height": "40", "video.latent_width": "60"})
    with (
        Running(engine, send_buffer_bytes=4096, stall_s=0.5) as server,
        server.realtime(max_queue=1, close_timeout=0.2) as client,
    ):
        client.start(chunks=7)
        client.next("started")  # and reads nothing more
        until(lambda: engine.open_sessions == 1)
        until(lambda: engine.open_sessions == 0, "freeing the session")
        assert engine.made[0] < 7
        with server.realtime() as other:
            other.start(chunks=1)
            assert other.next("ended")["reason"] == "done"
        until(lambda: server.metric("causalrt_connections") == 0, "ending the connection")
        assert server.metric('causalrt_generations_total{kind="realtime",reason="stalled"}') == 1
        assert server.metric("causalrt_dropped_frames_total") > 0


def test_a_stalled_reader_that_comes_back_is_told():
    engine = FakeEngine(max_sessions=1, changes={"video.latent_height": "40", "video.latent_width": "60"})
    with Running(engine, send_buffer_bytes=4096, stall_s=0.3) as server, server.realtime(max_queue=1) as client:
        client.start(chunks=7)
        until(lambda: engine.open_sessions == 1)
        until(lambda: engine.open_sessions == 0)
        assert client.closed() == 4408


@pytest.mark.parametrize("how", ["politely", "abruptly"])
def test_a_client_that_vanishes_in_mid_chunk_frees_its_session_within_it(held, how):
    with held.realtime() as client:
        client.start()
        held.engine.let(1)
        client.next("chunk")
        if how == "politely":
            client.socket.close()
        else:
            client.socket.socket.close()
    until(lambda: held.services.generator.stopping, "noticing")
    assert held.engine.open_sessions == 1  # the chunk is under way
    held.engine.let(1)
    until(lambda: held.engine.open_sessions == 0, "freeing the session")
    assert held.engine.made == {0: 2}
    with held.realtime() as other:
        other.start(chunks=1)
        held.engine.let(1)
        assert other.next("ended")["reason"] == "done"


def test_a_client_that_vanishes_from_the_queue_leaves_it(held):
    with held.realtime() as client, held.realtime() as waiting:
        client.start(chunks=1)
        client.next("started")
        waiting.start(chunks=1)
        waiting.next("queued")
        waiting.socket.close()
        until(lambda: held.services.admission.waiting == 0, "leaving")
        held.engine.let(1)
        client.next("ended")
    assert len(held.engine.sessions) == 1


def test_a_client_that_floods_the_server_and_reads_no_answer_is_closed():
    with Running(send_buffer_bytes=4096) as server, server.realtime(max_queue=1, close_timeout=0.2) as client:
        with contextlib.suppress(ConnectionClosed):
            for _ in range(50_000):
                client.socket.send("{}")
        until(lambda: server.metric("causalrt_connections") == 0, "closing it")


def test_a_client_that_pings_and_reads_no_answer_is_cut_off():
    with Running(send_buffer_bytes=4096) as server, unread(server) as client:
        pings = frame(9, b"x" * 125) * 1000
        with pytest.raises(ConnectionError):  # noqa: PT012
            for _ in range(1000):  # 130 MB, which would all be answered
                client.sendall(pings)
        until(lambda: not websockets_of(server), "cutting it off")


@pytest.mark.parametrize("first_byte", [b"\x00", b"\x89", b"\x8a"], ids=["fragments", "pings", "pongs"])
def test_a_client_without_a_token_that_floods_the_server_is_cut_off_and_others_are_served(first_byte):
    with Running(tokens=Tokens({b"": "alice"}), auth_s=60.0) as server, unread(server) as client:
        reader = threading.Thread(target=drain, args=(client,))  # or unread answers would be what ends it
        reader.start()
        with pytest.raises(ConnectionError):  # noqa: PT012
            client.sendall(b"\x01\x80" + bytes(4))
            for _ in range(1000):  # 24 MB, which would all be parsed
                client.sendall((first_byte + b"\x80" + bytes(4)) * 4000)
                assert server.http.get("/readyz").status_code == 200
        reader.join()
        until(lambda: not websockets_of(server), "cutting it off")


def test_a_client_that_floods_the_server_is_told_so(server):
    with unread(server) as client:
        client.sendall(frame(9, b"") * uvicorn_quirks.PER_MINUTE)  # all that is allowed at once
        received = b""
        while received.count(b"\x8a\x00") < uvicorn_quirks.PER_MINUTE:
            received += (part := client.recv(65536))
            assert part
        client.sendall(frame(9, b"") * 600)  # more than is allowed in the time until now, unless that was 10 s
        while part := client.recv(65536):
            received += part
        assert b"\x03\xf0too many messages, fragments or pings" in received


@pytest.mark.parametrize("token", [None, "wrong-0123456789"])
def test_a_body_in_tiny_chunks_is_cut_off_answered_or_not(token):
    with Running(tokens=Tokens({b"": "alice"})) as server, unread(server, upgrade=False) as client:
        head = "POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
        head += "Content-Type: application/json\r\n" + (f"Authorization: Bearer {token}\r\n" if token else "")
        client.sendall(f"{head}\r\n".encode())
        with pytest.raises(ConnectionError):  # noqa: PT012
            for _ in range(1000):
                client.sendall(b"1\r\nx\r\n" * 4000)
        assert server.http.get("/readyz").status_code == 200


def test_nulls_count_as_left_out(server):
    with server.realtime() as client:
        client.start(seed=None, chunks=1, negative_prompt=None)
        assert client.next("started")["seed"] == 0
        client.next("ended")
        client.send("start", prompt=None)
        assert "prompt: Field required" in client.next("error")["message"]
        client.send("start", prompt="a fox", seed=None, other=1)
        assert "other" in client.next("error")["message"]


def test_a_message_in_some_fragments_is_read(server):
    with server.realtime() as client:
        client.socket.send(iter('{"type": "start", "prompt": "a fox", "chunks": 1}'))
        assert client.next("ended")["reason"] == "done"


def test_a_slow_reader_may_ping():
    engine = FakeEngine(changes={"video.latent_height": "40", "video.latent_width": "60"})
    with Running(engine, send_buffer_bytes=4096) as server, unread(server) as client:
        client.sendall(frame(1, b'{"type": "start", "prompt": "a fox", "chunks": 7}'))
        (open_one,) = until(lambda: websockets_of(server))
        until(lambda: not open_one.writable.is_set(), "a full connection")
        client.sendall(frame(9, b"ping") * 20)
        client.sendall(frame(9, b"the last"))
        received = bytearray()
        while b'"ended"' not in received[-65536:]:
            received += client.recv(4096)
        assert received.count(b"\x8a\x04ping") == 20
        assert b"\x8a\x08the last" in received


def test_a_client_that_closes_and_reads_nothing_is_cut_off(monkeypatch):
    monkeypatch.setattr(uvicorn_quirks, "LINGER_S", 0.2)
    engine = FakeEngine(changes={"video.latent_height": "40", "video.latent_width": "60"})
    with Running(engine, send_buffer_bytes=4096) as server, unread(server) as client:
        client.sendall(frame(1, b'{"type": "start", "prompt": "a fox", "chunks": 7}'))
        (open_one,) = until(lambda: websockets_of(server))
        until(lambda: not open_one.writable.is_set(), "a full connection")
        client.sendall(frame(8, b"\x03\xe8"))
        until(lambda: not websockets_of(server), "cutting it off")
        until(lambda: engine.open_sessions == 0, "freeing the session")


def test_a_flood_ends_without_a_reader_and_with_its_reason(monkeypatch):
    message = frame(1, b'{"type": "%s"}' % (b"A" * 100))
    for linger_s, reads in ((0.2, False), (8.0, True)):
        monkeypatch.setattr(uvicorn_quirks, "LINGER_S", linger_s)
        with Running(send_buffer_bytes=4096) as server, unread(server) as client:
            with contextlib.suppress(OSError):
                client.settimeout(0.5)  # the server reads no more
                for _ in range(100):
                    client.sendall(message * 500)
            if reads:
                client.settimeout(DEADLINE_S)
                received = b""
                while b"\x03\xf0too many messages" not in received[-200:]:
                    received += (part := client.recv(65536))
                    assert part, "the connection ended without a reason"
                client.close()
            until(lambda s=server: not websockets_of(s), "closing it")


def test_connections_are_limited():
    with Running(max_connections=1) as server, server.realtime(), server.realtime(ready=False) as second:
        assert second.next("error")["code"] == "busy"
        assert second.closed() == 4429


def test_a_handshake_at_another_path_is_refused(server):
    with pytest.raises(InvalidStatus):
        connect(server.url.replace("http", "ws") + "/v1/other")
