"""Connections that hold their place and do nothing: they are closed, and others are served meanwhile."""

import contextlib
import errno
import logging
import resource
import socket
import threading

import httpx
import pytest
from support.fake_engine import FakeEngine
from support.running import DEADLINE_S, Running, until

from causalrt.errors import ConfigError
from causalrt.server import connections
from causalrt.server.connections import connection_limit
from causalrt.server.settings import ServerSettings

HEAD = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"


@contextlib.contextmanager
def clients(server, number, *, source="127.0.0.1"):
    """So many open sockets, from an address of their own perhaps."""
    host, port = server.url.removeprefix("http://").split(":")
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(socket.create_connection((host, int(port)), DEADLINE_S, source_address=(source, 0)))
            for _ in range(number)
        ]


def received(client):
    """All that comes until the server closes."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while part := client.recv(65536):
            data += part
    return data


def num_open(server):
    return len(server.server.server_state.connections)


def answered(server):
    """Whether a client with a connection of its own is served."""
    return httpx.get(f"{server.url}/healthz", timeout=DEADLINE_S).status_code == 200


def test_idle_connections_give_way_to_those_that_come_later():
    with Running(max_tcp_connections=16, head_s=600.0) as server, clients(server, 100) as idle:
        assert answered(server)
        until(lambda: num_open(server) <= 8, "closing all but what one address may have")
        job = server.post(seconds=1)
        assert server.finished(job.json()["id"])["status"] == "completed"
        assert received(idle[0]) == b""  # the oldest went first


def test_requests_whose_bodies_do_not_come_give_way_to_those_that_come_later():
    head = (
        b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{"
    )
    with Running(max_tcp_connections=16, body_s=600.0) as server, clients(server, 8) as slow:
        for client in slow:
            client.sendall(head)
        until(lambda: len(server.server.server_state.tasks) == 8, "the requests")
        assert answered(server)
        assert num_open(server) <= 8


def test_one_address_leaves_room_for_others():
    """Its connections are in use, so none of them is closed; it gets no further one."""
    with Running(max_tcp_connections=8) as server, contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(server.realtime()) for _ in range(4)]
        with clients(server, 1) as (refused,):
            assert received(refused) == b""
        with clients(server, 1, source="127.0.0.2") as (other,):
            other.sendall(HEAD + b"Connection: close\r\n\r\n")
            assert received(other).startswith(b"HTTP/1.1 200")
        sockets[0].start(chunks=1)
        assert sockets[0].next("ended")["reason"] == "done"


def test_a_trusted_proxy_may_have_all_connections():
    with (
        Running(max_tcp_connections=8, trusted_proxies=("127.0.0.1",)) as server,
        contextlib.ExitStack() as stack,
    ):
        sockets = [stack.enter_context(server.realtime()) for _ in range(8)]
        with clients(server, 1) as (refused,):
            assert received(refused) == b""
        assert [socket.ready["type"] for socket in sockets] == ["ready"] * 8


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (b"", b""),
        (b"G", b"HTTP/1.1 408 "),
        (HEAD, b"HTTP/1.1 408 "),
        (HEAD + b"Upgrade: websocket\r\nConnection: Upgrade\r\n", b"HTTP/1.1 408 "),
        (HEAD + b"\r\n" + HEAD, b"HTTP/1.1 200 "),  # the second one does not end
    ],
    ids=["nothing", "letter", "half", "websocket", "second"],
)
def test_a_head_that_does_not_end_is_given_up(sent, answer):
    with Running(head_s=0.5) as server, clients(server, 1) as (client,):
        client.sendall(sent)
        said = received(client)
        assert said.startswith(answer)
        assert answer or not said
        until(lambda: num_open(server) == 0)


def test_a_head_that_comes_byte_by_byte_is_given_up():
    with Running(head_s=0.5) as server, clients(server, 1) as (client,):
        ended = threading.Event()

        def trickle():
            with contextlib.suppress(OSError):
                client.sendall(HEAD + b"X-Long: ")
                while not ended.wait(0.02):
                    client.sendall(b"a")

        thread = threading.Thread(target=trickle)
        thread.start()
        try:
            assert received(client)[:13] in (b"HTTP/1.1 408 ", b"")  # a reset may overtake the answer
        finally:
            ended.set()
            thread.join()
        until(lambda: num_open(server) == 0)


def test_connections_in_use_have_as_long_as_they_need():
    engine = FakeEngine()
    engine.hold()
    with Running(engine, head_s=0.2) as server, server.realtime() as client:
        client.start(chunks=1)
        client.next("started")
        with clients(server, 1) as (late,):  # three periods go by
            late.sendall(HEAD)
            assert received(late).startswith(b"HTTP/1.1 408 ")
        engine.let(1)
        assert client.next("ended")["reason"] == "done"


def test_an_answer_that_nobody_reads_is_given_up(tmp_path):
    engine = FakeEngine(changes={"video.latent_height": "40", "video.latent_width": "60"})
    with Running(engine, stall_s=0.6, send_buffer_bytes=4096, spool=tmp_path / "spool") as server:
        job = server.finished(server.post(seconds=4).json()["id"])
        server.http.close()
        with clients(server, 1) as (client,):
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.sendall(f"GET /v1/videos/{job['id']}/content HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            until(lambda: num_open(server) == 1, "the download")
            until(lambda: num_open(server) == 0, "its end")
            assert len(received(client)) < (tmp_path / "spool" / f"{job['id']}.mp4").stat().st_size


def test_without_descriptors_the_log_stays_small_and_connections_are_accepted_later(monkeypatch, caplog):
    monkeypatch.setattr(connections, "RETRY_S", 0.001)
    with Running() as server, caplog.at_level(logging.INFO):
        accept, failures = server.loop.sock_accept, [OSError(errno.EMFILE, "Too many open files")] * 500

        async def failing(listening):
            if failures:
                raise failures.pop()
            return await accept(listening)

        monkeypatch.setattr(server.loop, "sock_accept", failing)
        assert answered(server)  # by the accept that was under way
        with clients(server, 1) as (waiting,):
            waiting.sendall(HEAD + b"Connection: close\r\n\r\n")
            assert received(waiting).startswith(b"HTTP/1.1 200")
        assert not failures
        assert answered(server)
    said = [record.getMessage() for record in caplog.records if "Too many open files" in record.getMessage()]
    assert len(said) == 10


def test_what_is_no_http_does_not_fill_the_log(caplog):
    with Running(max_tcp_connections=512) as server:
        for _ in range(4):
            with clients(server, 25) as noisy:
                for client in noisy:
                    client.sendall(b"\x16\x03\x01 what is this\r\n\r\n")
                    assert received(client).startswith(b"HTTP/1.1 400")
    assert len([record for record in caplog.records if "Invalid HTTP" in record.getMessage()]) == 10


def test_the_limit_leaves_descriptors_for_the_engine(monkeypatch, caplog):
    settings = ServerSettings()

    def limit(descriptors):
        monkeypatch.setattr(resource, "getrlimit", lambda kind: (descriptors, descriptors))
        return connection_limit(settings)

    assert limit(65536) == limit(resource.RLIM_INFINITY) == settings.max_tcp_connections
    assert not caplog.records
    assert 8 <= limit(400) <= (400 - connections.DESCRIPTORS_KEPT) // 2
    assert "the process may open 400 files" in caplog.text
    with pytest.raises(ConfigError, match=r"may open 50 files and sockets, .* allow at least \d+ \(ulimit -n"):
        limit(50)
