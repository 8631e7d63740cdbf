"""How much one may ask for: rates, places in the queue, sessions."""

import hashlib
import io
from concurrent.futures import ThreadPoolExecutor

import av
import httpx
from support.fake_engine import FakeEngine
from support.running import Running, until

from causalrt.server.auth import Tokens

ALICE, BOB = "alice-0123456789", "bob-9876543210-x"


def test_a_client_that_asks_too_often_is_told_when_to_come_back():
    tokens = Tokens({hashlib.sha256(token.encode()).digest(): token for token in (ALICE, BOB)})
    with Running(tokens=tokens, generations_per_minute=2) as server:

        def post(token):
            return server.http.post(
                "/v1/videos", json={"prompt": "a fox", "seconds": 1}, headers={"Authorization": f"Bearer {token}"}
            )

        assert [post(ALICE).status_code for _ in range(3)] == [200, 200, 429]
        refused = post(ALICE)
        assert refused.json()["error"]["code"] == "rate_limited"
        assert 1 <= int(refused.headers["retry-after"]) <= 30
        assert post(BOB).status_code == 200
        with server.realtime(additional_headers={"Authorization": f"Bearer {ALICE}"}) as client:
            client.start()
            error = client.next("error")
            assert error["code"] == "rate_limited"
            assert error["retry_after_s"] >= 1


def test_a_full_queue_refuses_jobs_and_starts():
    engine = FakeEngine(max_sessions=1)
    engine.hold()
    with Running(engine, max_queue=1) as server, server.realtime() as client:
        first, second = (server.post(seconds=1).json()["id"] for _ in range(2))
        refused = server.post()
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "busy")
        assert int(refused.headers["retry-after"]) >= 1
        client.start()
        assert client.next("error")["code"] == "busy"
        engine.let(100)
        assert {server.finished(job)["status"] for job in (first, second)} == {"completed"}
        client.start(chunks=1)
        assert client.next("ended")["reason"] == "done"


def test_fifty_at_once_on_four_sessions_and_none_is_lost():
    """Half of the clients want a file, half of them real time; the queue holds twenty of them."""
    engine = FakeEngine(max_sessions=4, chunk_s=0.01)

    def job(server, number):
        answer = httpx.post(
            f"{server.url}/v1/videos", json={"prompt": "a fox", "seconds": 2, "seed": number}, timeout=30
        )
        if answer.status_code == 429:
            assert int(answer.headers["retry-after"]) >= 1
            return "refused"
        assert answer.status_code == 200
        video = server.finished(answer.json()["id"])
        content = httpx.get(f"{server.url}/v1/videos/{video['id']}/content", timeout=30).content
        with av.open(io.BytesIO(content)) as container:
            assert sum(1 for _ in container.decode(video=0)) == 32
        return video["status"]

    def stream(server, number):
        with server.realtime() as client:
            client.start(chunks=3, seed=number)
            while (message := client.read()) is None or message["type"] not in ("ended", "error"):
                pass
            if message["type"] == "error":
                assert (message["code"], message["retry_after_s"] >= 1) == ("busy", True)
                return "refused"
            assert [seen["index"] for seen in client.seen if seen["type"] == "chunk"] == [0, 1, 2]
            return message["reason"]

    with Running(engine, max_queue=20) as server, ThreadPoolExecutor(50) as pool:
        engine.hold()  # until all have asked
        futures = [pool.submit((job, stream)[number % 2], server, number) for number in range(50)]
        until(lambda: sum(future.done() for future in futures) == 26, "the refusal of those for whom there is no place")
        engine.let(1000)
        outcomes = [future.result(60) for future in futures]
        assert outcomes.count("refused") == 26
        assert outcomes.count("completed") + outcomes.count("done") == 24
        assert engine.most_open == 4
        until(lambda: engine.open_sessions == 0)
        assert server.metric("causalrt_sessions") == server.metric("causalrt_queue_length") == 0


def test_fifty_at_once_with_a_queue_for_them_all_are_all_served():
    engine = FakeEngine(max_sessions=4)
    with Running(engine, max_queue=50) as server, ThreadPoolExecutor(50) as pool:
        jobs = list(pool.map(lambda number: server.post(seconds=1, seed=number).json()["id"], range(50)))
        assert {server.finished(job)["status"] for job in jobs} == {"completed"}
        assert engine.most_open <= 4
        assert len(engine.sessions) == 50


def test_an_engine_with_less_room_than_allowed_sets_the_limit():
    with Running(FakeEngine(max_sessions=2), max_sessions=10) as server:
        assert server.metric("causalrt_sessions_limit") == 2


def test_a_session_that_finds_no_memory_says_so():
    engine = FakeEngine(max_sessions=4)
    with Running(engine) as server, server.realtime() as client:
        engine.max_sessions = 0  # somebody else has it
        job = server.finished(server.post().json()["id"])
        assert (job["status"], job["error"]["code"]) == ("failed", "busy")
        client.start()
        assert client.next("error")["code"] == "busy"
