"""Video jobs over HTTP, against a fake engine."""

import io
import json
import os
import re
import time

import av
import httpx
import pytest
from support.fake_engine import FakeEngine
from support.running import Running, until

from causalrt.errors import RequestError
from causalrt.server import jobs
from causalrt.server.job_store import JobStore


@pytest.fixture(scope="module")
def server():
    with Running() as running:
        yield running


def form(disposition, value=b"a fox"):
    return b"--x\r\nContent-Disposition: form-data; " + disposition + b"\r\n\r\n" + value + b"\r\n--x--\r\n"


def frames_of(data):
    with av.open(io.BytesIO(data)) as container:
        return [frame.pts * frame.time_base for frame in container.decode(video=0)]


def test_a_job_from_request_to_file(server):
    before = time.time()
    answer = server.post(seconds="2", seed=7, size="48x32", model="causalrt")
    assert answer.status_code == 200
    job = answer.json()
    assert job == {
        "object": "video",
        "model": "causalrt",
        "prompt": "a fox",
        "seconds": "2",
        "size": "48x32",
        "seed": 7,
        "status": "queued",
        "progress": 0,
        "error": None,
        "remixed_from_video_id": None,
        "warnings": [],
        "id": job["id"],
        "created_at": job["created_at"],
        "completed_at": None,
        "expires_at": None,
    }
    assert before - 1 < job["created_at"] < before + 30
    done = server.finished(job["id"])
    assert (done["status"], done["progress"], done["error"]) == ("completed", 100, None)
    assert done["created_at"] <= done["completed_at"] < done["expires_at"]
    content = server.http.get(f"/v1/videos/{job['id']}/content")
    assert content.headers["content-type"] == "video/mp4"
    assert frames_of(content.content) == [number / 16 for number in range(32)]  # two seconds, no frame more


def test_a_video_is_served_in_ranges(server):
    job = server.finished(server.post(seconds=1).json()["id"])
    url = f"/v1/videos/{job['id']}/content"
    whole = server.http.get(url)
    assert server.http.head(url).headers["content-length"] == str(len(whole.content))
    part = server.http.get(url, headers={"Range": "bytes=4-7"})
    assert (part.status_code, part.content) == (206, b"ftyp")
    assert part.headers["content-range"] == f"bytes 4-7/{len(whole.content)}"
    tail = server.http.get(url, headers={"Range": "bytes=-10", "If-Range": whole.headers["etag"]})
    assert tail.content == whole.content[-10:]
    assert server.http.get(url, headers={"Range": f"bytes={10**9}-"}).status_code == 416
    assert server.http.get(url, params={"variant": "thumbnail"}).status_code == 400


def test_a_form_is_as_good_as_json(server):
    form = {name: (None, value) for name, value in {"prompt": "a fox", "seconds": "1.5", "seed": "3"}.items()}
    job = server.http.post("/v1/videos", files=form).json()
    assert (job["seconds"], job["seed"]) == ("1.5", 3)
    assert server.http.post("/v1/videos", data={"prompt": "a fox"}).status_code == 200


NULLS = dict.fromkeys(("input_reference", "model", "seconds", "size", "seed", "remix_of", "quality", "user"))


def test_nulls_count_as_left_out(server):
    answer = server.http.post("/v1/videos", json={"prompt": "a fox", **NULLS})
    assert answer.status_code == 200
    assert (answer.json()["seconds"], answer.json()["size"], answer.json()["seed"]) == ("4", "48x32", 0)
    assert server.http.post("/v1/videos", json={"prompt": None, **NULLS}).json()["error"]["param"] == "prompt"


@pytest.mark.parametrize("kind", ["json", "data", "files"])
@pytest.mark.parametrize("others", [1, 2, 900])
def test_a_field_that_is_unknown_is_named_in_json_and_in_forms_of_any_size(server, kind, others):
    fields = {"prompt": "a fox", "model": "causalrt", "seconds": "1", "size": "48x32", "seed": "3"}
    fields |= {f"other{number}": "x" for number in range(others)}
    body = {name: (None, value) for name, value in fields.items()} if kind == "files" else fields
    limited = kind == "files" and others == 900  # past the 64 KiB of a body
    error = server.http.post("/v1/videos", **{kind: body}).json()["error"]
    assert (error["code"], error["param"]) == (("too_large", None) if limited else ("unknown_parameter", "other0"))


def test_a_form_with_a_picture_is_told_that_it_is_not_taken(server):
    files = {"input_reference": ("fox.png", b"picture", "image/png")}
    answer = server.http.post("/v1/videos", data={"prompt": "a fox"}, files=files)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input_reference")


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"prompt": None}, "prompt", "must be a string"),
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": "  \n"}, "prompt", "empty"),
        ({"prompt": "x" * 2001}, "prompt", "2000 characters, got 2001"),
        ({"prompt": "a\x00b"}, "prompt", "U[+]0000"),
        ({"prompt": "\ud800"}, "prompt", "U[+]D800"),
        ({"prompt": ["a"]}, "prompt", "must be a string"),
        ({"size": "1280x720"}, "size", "is 48x32"),
        ({"model": "sora-2"}, "model", "causalrt"),
        ({"seconds": "0"}, "seconds", "to 5.062"),
        ({"seconds": "-1"}, "seconds", "to 5.062"),
        ({"seconds": "6"}, "seconds", "to 5.062"),
        ({"seconds": "1e1"}, "seconds", "to 5.062"),
        ({"seconds": "four"}, "seconds", "to 5.062"),
        ({"seconds": "\u0664"}, "seconds", "to 5.062"),
        ({"seconds": float("nan")}, "seconds", "to 5.062"),
        ({"seconds": True}, "seconds", "to 5.062"),
        ({"seed": -1}, "seed", "whole number"),
        ({"seed": 2**64}, "seed", "whole number"),
        ({"seed": True}, "seed", "whole number"),
        ({"seed": 1.5}, "seed", "whole number"),
        ({"input_reference": "x"}, "input_reference", "unknown parameter"),
        ({"\ud800": "x"}, "\\ud800", "unknown parameter"),
    ],
)
def test_a_request_that_cannot_be_served_is_400(server, fields, param, message):
    body = json.dumps({"prompt": "a fox", **fields})
    answer = server.http.post("/v1/videos", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert re.search(message, error["message"])


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"[]", "application/json", 400),
        (b"[" * 60_000, "application/json", 400),
        (b'{"seed": ' + b"9" * 5000 + b"}", "application/json", 400),
        (b"\xff", "application/json", 400),
        (b"", "application/json", 400),
        (b"prompt", "text/plain", 415),
        (b"no form", "multipart/form-data", 400),
        (b"no form", "multipart/form-data; boundary=x", 400),
        (form(b'name="prompt"; filename="a"'), "multipart/form-data; boundary=x", 400),
        (form(b"nameless"), "multipart/form-data; boundary=x", 400),
        (b"prompt=a&prompt=b", "application/x-www-form-urlencoded", 400),
        (b" " * 65537, "application/json", 413),
    ],
)
def test_a_body_that_cannot_be_read_is_refused(server, body, kind, status):
    answer = server.http.post("/v1/videos", content=body, headers={"Content-Type": kind})
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


def test_a_body_without_a_length_is_limited_too(server):
    answer = server.http.post(
        "/v1/videos", content=(b" " * 1000 for _ in range(100)), headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 413


@pytest.mark.parametrize(
    "name",
    [
        "video_" + "0" * 32,
        "x",
        "..",
        "../../etc/passwd",
        "%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "video_%00",
        "%ff",
        "video_" + "a" * 5000,
    ],
)
@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_an_unknown_id_is_404_whatever_it_looks_like(server, name, method):
    for tail in ("", "/content"):
        if method == "DELETE" and tail:
            continue
        # httpx would tidy dots away: the path is sent as it stands.
        url = httpx.URL(server.url).copy_with(raw_path=f"/v1/videos/{name}{tail}".encode())
        answer = server.http.request(method, url)
        assert answer.status_code in (404, 405)
        assert "root:" not in answer.text


def test_lists_are_paged(server):
    made = [server.post(seconds=1).json()["id"] for _ in range(3)]
    for video_id in made:
        server.finished(video_id)
    newest = server.http.get("/v1/videos", params={"limit": 2}).json()
    assert [job["id"] for job in newest["data"]] == made[:0:-1]
    assert (newest["first_id"], newest["last_id"], newest["has_more"]) == (made[2], made[1], True)
    following = server.http.get("/v1/videos", params={"limit": 1, "after": made[1]}).json()
    assert [job["id"] for job in following["data"]] == [made[0]]
    oldest = server.http.get("/v1/videos", params={"order": "asc", "limit": 100}).json()
    assert [job["id"] for job in oldest["data"]][-3:] == made
    assert server.http.get("/v1/videos", params={"limit": 0}).status_code == 400
    assert server.http.get("/v1/videos", params={"after": "x"}).status_code == 404


def test_a_deleted_video_is_gone_with_its_file(server):
    job = server.finished(server.post(seconds=1).json()["id"])
    assert server.http.delete(f"/v1/videos/{job['id']}").json() == {
        "id": job["id"],
        "object": "video.deleted",
        "deleted": True,
    }
    assert server.http.get(f"/v1/videos/{job['id']}/content").status_code == 404
    assert not [path for path in server.services.store.folder.iterdir() if job["id"] in path.name]


def test_the_spool_is_private(tmp_path):
    with Running(spool=tmp_path / "new" / "spool") as server:
        folder = server.services.store.folder
        assert folder.stat().st_mode & 0o777 == 0o700
        folder.chmod(0o755)
        job = server.finished(server.post(seconds=1).json()["id"])
        names = {".lock", f"{job['id']}.json", f"{job['id']}.mp4"}
        assert {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()} == dict.fromkeys(names, 0o600)


def test_a_server_refuses_the_folder_of_somebody_else(tmp_path):
    (tmp_path / "holiday.mp4").write_bytes(b"precious")
    with (
        pytest.raises(RequestError, match=r"holds 'holiday\.mp4'; give a new or an empty folder"),
        Running(spool=tmp_path),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.mp4"]


def test_a_prompt_that_cannot_be_encoded_fails_its_job_alone(server):
    job = server.finished(server.post(prompt="unencodable").json()["id"])
    assert (job["status"], job["error"]["code"]) == ("failed", "invalid_value")
    answer = server.http.get(f"/v1/videos/{job['id']}/content")
    assert answer.status_code == 404
    assert "cannot be encoded" in answer.json()["error"]["message"]
    assert server.finished(server.post(seconds=1).json()["id"])["status"] == "completed"


# ---- jobs under way


def test_a_prompt_that_is_cut_is_told_in_each_answer(server):
    for words, cut in ((65, True), (65, True), (64, False)):
        job = server.post(prompt="word " * words, seconds=0.1).json()
        assert [(warning["code"], warning["param"]) for warning in job["warnings"]] == [("prompt_cut", "prompt")] * cut
        assert all("first 64 tokens" in warning["message"] for warning in job["warnings"])
        assert server.finished(job["id"])["warnings"] == job["warnings"]
        assert server.http.get("/v1/videos", params={"limit": 1}).json()["data"][0]["warnings"] == job["warnings"]


def test_progress_and_deletion_of_a_job_that_runs():
    engine = FakeEngine(max_sessions=1)
    engine.hold()
    with Running(engine) as server:
        first, second, third = (server.post(seconds=5).json()["id"] for _ in range(3))
        engine.let(2)
        until(lambda: server.video(first)["progress"] == 2 * 100 // 7)
        assert server.video(first)["status"] == "in_progress"
        assert server.video(second)["status"] == "queued"
        answer = server.http.get(f"/v1/videos/{first}/content")
        assert (answer.status_code, answer.headers["retry-after"]) == (409, "1")
        assert server.metric("causalrt_queue_length") == 2
        assert server.metric('causalrt_jobs{status="in_progress"}') == 1
        assert server.metric("causalrt_kv_bytes") == 1000
        server.http.delete(f"/v1/videos/{second}")  # it waits
        server.http.delete(f"/v1/videos/{first}")  # it runs, and ends with the chunk it is in
        engine.let(8)
        assert server.finished(third)["status"] == "completed"
        assert engine.made == {0: 3, 1: 7}
        assert [path.suffix for path in server.services.store.folder.glob("video_*")].count(".mp4") == 1
        assert not list(server.services.store.folder.glob("*.partial"))


def test_finished_jobs_outlive_a_server_and_halves_do_not(tmp_path):
    engine = FakeEngine()
    with Running(engine, spool=tmp_path / "spool", grace_s=0.0) as server:
        kept = server.finished(server.post(seconds=1).json()["id"])
        engine.hold()
        engine.let(1)
        broken = server.post(seconds=5).json()["id"]
        until(lambda: server.video(broken)["progress"])
        assert list((tmp_path / "spool").glob("*.partial"))
        server.end()
        engine.let(1)
        server.ended()
        assert not list((tmp_path / "spool").glob("*.partial"))
    (tmp_path / "spool" / f".video_{'0' * 32}.mp4.0123456789ab.partial").touch()
    (tmp_path / "spool" / f"video_{'0' * 32}.mp4").touch()
    with Running(spool=tmp_path / "spool") as server:
        assert server.video(kept["id"]) == kept
        assert frames_of(server.http.get(f"/v1/videos/{kept['id']}/content").content)
        found = server.video(broken)
        assert (found["status"], found["error"]["code"]) == ("failed", "server_shutdown")
        names = sorted(path.name for path in (tmp_path / "spool").iterdir())
        assert names == sorted([".lock", f"{kept['id']}.json", f"{kept['id']}.mp4", f"{broken}.json"])
        with pytest.raises(RequestError, match="another server uses"):
            JobStore(tmp_path / "spool")


def test_jobs_expire():
    with Running(job_ttl_s=0.5) as server:
        job = server.finished(server.post(seconds=1).json()["id"])
        until(lambda: server.services.jobs.expire() or not server.http.get("/v1/videos").json()["data"])
        assert server.http.get(f"/v1/videos/{job['id']}").status_code == 404
        assert not list(server.services.store.folder.glob("video_*"))


def test_jobs_expire_in_portions(monkeypatch):
    monkeypatch.setattr(jobs, "EXPIRE_AT_ONCE", 2)
    with Running(job_ttl_s=0.5) as server:
        for job in [server.post(seconds=0.1).json()["id"] for _ in range(3)]:
            server.finished(job)
        time.sleep(
            max(0.0, max(job["expires_at"] for job in server.http.get("/v1/videos").json()["data"]) - time.time())
        )
        assert server.services.jobs.expire()
        assert len(server.http.get("/v1/videos").json()["data"]) == 1
        assert not server.services.jobs.expire()
        assert not list(server.services.store.folder.glob("video_*"))


@pytest.mark.parametrize("limit", [{"max_jobs": 1}, {"max_spool_bytes": 1}])
def test_a_full_spool_takes_no_job(limit):
    with Running(**limit) as server:
        job = server.finished(server.post(seconds=1).json()["id"])
        refused = server.post()
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "spool_full"
        assert 80_000 < int(refused.headers["retry-after"]) <= 86_400
        server.http.delete(f"/v1/videos/{job['id']}")
        assert server.post().status_code == 200


def test_a_disk_that_cannot_be_written_is_503_or_fails_the_job(tmp_path):
    with Running(spool=tmp_path / "spool") as server:
        folder = server.services.store.folder
        folder.rename(tmp_path / "away")
        assert server.post().status_code == 503
        (tmp_path / "away").rename(folder)
        server.engine.hold()
        job = server.post(seconds=5).json()["id"]
        until(lambda: list(folder.glob("*.partial")))
        folder.rename(tmp_path / "away")
        server.engine.let(10)
        failed = server.finished(job)
        assert (failed["status"], failed["error"]["code"]) == ("failed", "video_failed")
        assert str(tmp_path) not in failed["error"]["message"]
        (tmp_path / "away").rename(folder)


def test_spools_that_cannot_be_used_are_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match="--spool"):
        JobStore(tmp_path / "file")
    if os.geteuid():
        with pytest.raises(RequestError, match="--spool"):
            JobStore(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("given", "taken"),
    [("4", "4"), ("4.0", "4.0"), (4, "4"), (2.5, "2.5"), (1e-3, "0.001"), ("1e-3", "0.001"), (None, "4")],
)
def test_seconds_may_be_a_number_or_a_text(server, given, taken):
    assert server.post(seconds=given).json()["seconds"] == taken
