"""Who may use the server: tokens, hosts, origins; and what every answer carries."""

import hashlib
import logging
import re
import socket

import pytest
from fastapi.routing import APIRoute
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient
from support.running import Running, until
from websockets.exceptions import InvalidStatus

from causalrt.errors import ConfigError
from causalrt.server import log_limit
from causalrt.server.auth import Tokens
from causalrt.server.request_guard import RequestGuard
from causalrt.server.settings import ServerSettings

ALICE, BOB = "alice-0123456789", "bob-9876543210-x"
TOKENS = Tokens({hashlib.sha256(ALICE.encode()).digest(): "alice"})


def token_file(path, text, mode=0o600):
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.fixture(autouse=True, scope="module")
def whole_log():
    """These tests read what is logged, by more servers in a minute than the limit lets through."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log_limit, "PER_MINUTE", 1_000_000)
        yield


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    path = token_file(tmp_path_factory.mktemp("tokens") / "tokens", f"# ours\nalice:{ALICE}\n\nbob:{BOB}\n")
    with Running(tokens=Tokens.from_file(path), auth_s=0.5) as running:
        yield running


def bearer(token):
    return {"Authorization": f"Bearer {token}"}


# ---- tokens


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer("wrong-0123456789"),
        {"Authorization": "Bearer"},
        bearer(ALICE[:-1]),
        bearer(ALICE + "x"),
        {"Authorization": f"Basic {ALICE}"},
    ],
)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/videos"),
        ("GET", "/v1/videos"),
        ("GET", "/v1/videos/x"),
        ("GET", "/v1/videos/x/content"),
        ("DELETE", "/v1/videos/x"),
        ("GET", "/metrics"),
    ],
)
def test_without_a_valid_token_everything_is_401(guarded, method, path, headers):
    answer = guarded.http.request(method, path, headers=headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"]["type"] == "authentication_error"


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/openapi.json"])
def test_health_needs_no_token(guarded, path):
    assert guarded.http.get(path).status_code == 200


def test_jobs_are_their_owners_alone(guarded):
    job = guarded.http.post("/v1/videos", json={"prompt": "a fox"}, headers=bearer(ALICE)).json()
    for method, tail in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
        url = f"/v1/videos/{job['id']}{tail}"
        assert guarded.http.request(method, url, headers=bearer(BOB)).status_code == 404
    assert guarded.http.get("/v1/videos", headers=bearer(BOB)).json()["data"] == []
    assert [found["id"] for found in guarded.http.get("/v1/videos", headers=bearer(ALICE)).json()["data"]] == [
        job["id"]
    ]


def test_a_websocket_takes_its_token_from_the_handshake_or_the_first_message(guarded):
    with guarded.realtime(additional_headers=bearer(ALICE)) as client:
        client.start(chunks=1)
        client.next("ended")
    with guarded.realtime(ready=False) as client:
        client.send("auth", token=ALICE)
        client.next("ready")
        client.send("auth", token=BOB)  # somebody else, in the midst of it
        assert client.next("error")["code"] == "unauthorized"


@pytest.mark.parametrize(
    "message",
    [
        '{"type": "auth", "token": "wrong-0123456789"}',
        '{"type": "auth", "token": ""}',
        '{"type": "start", "prompt": "x"}',
    ],
)
def test_a_websocket_without_a_valid_token_is_closed(guarded, message):
    with guarded.realtime(ready=False) as client:
        client.socket.send(message)
        assert client.next("error")["code"] == "unauthorized"
        assert client.closed() == 4401
    assert not guarded.engine.open_sessions


def test_a_websocket_that_says_nothing_is_closed(guarded):
    with guarded.realtime(ready=False) as client:
        assert client.closed() == 4408
    with guarded.realtime(ready=False, additional_headers=bearer("wrong-0123456789")) as client:
        assert client.closed() == 4401
    with guarded.realtime(ready=False) as client:
        client.socket.send("{")
        assert client.closed() == 4401


def test_strangers_take_no_connection_from_those_with_a_token():
    with Running(tokens=TOKENS, max_connections=1) as server:
        server.http.headers.update(bearer(ALICE))
        with server.realtime(ready=False), server.realtime(ready=False) as stranger:
            assert stranger.closed() == 4429
            with server.realtime(additional_headers=bearer(ALICE)) as client:
                client.start(chunks=1)
                assert client.next("ended")["reason"] == "done"
                with server.realtime(ready=False, additional_headers=bearer(ALICE)) as second:
                    assert second.closed() == 4429


def test_tokens_are_never_logged(caplog):
    with Running(tokens=TOKENS) as server, caplog.at_level(0), caplog.at_level(0, logger="uvicorn.access"):
        server.http.get("/v1/videos", headers=bearer(ALICE))
        server.http.get("/v1/videos", headers=bearer("wrong-0123456789"))
        with server.realtime(ready=False) as client:
            client.send("auth", token=ALICE)
            client.next("ready")
    ours = [
        record for record in caplog.records if not record.name.startswith(("httpx", "httpcore", "websockets.client"))
    ]
    logged = "\n".join(record.getMessage() for record in ours)
    assert "Application startup complete" in logged
    assert ALICE not in logged
    assert "wrong-0123456789" not in logged


def upgrade(server, path, *headers, then=b""):
    """A WebSocket's handshake as it is given, and the first line of the answer, or nothing if there is none."""
    with socket.create_connection((server.settings.host, int(server.url.rpartition(":")[2])), timeout=30) as client:
        lines = [f"GET {path} HTTP/1.1", "Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13"]
        lines += ["Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==", *headers, "", ""]
        client.sendall("\r\n".join(lines).encode() + then)
        answer = client.recv(65536).partition(b"\r\n")[0].decode()
        if then and answer:
            client.sendall(then)
            while client.recv(65536):
                pass
        return answer


HOST = "Host: localhost"


HANDSHAKES = [
    ("/v1/realtime?token={}", (HOST,), "101"),
    ("/v1/realtime?token={}", ("Host: evil.example",), "421"),
    ("/v1/realtime?token={}", (HOST, "Origin: http://evil.example"), "403"),
    ("/v1/other?token={}", (HOST,), "403"),
    ("/v1/" + "x" * 5000 + "?token={}", (HOST,), "403"),
    ("/v1/" + "x" * 9000 + "?token={}", (HOST,), "414"),
    ("/v1/realtime?token={}", (HOST, *(f"X-{number}: {{}}" for number in range(130))), "431"),
    ("/v1/realtime?token={}", (HOST, "Sec-WebSocket-Key: {}"), "400"),
]


def test_a_handshake_leaves_a_short_line_without_its_query(caplog):
    with Running(tokens=TOKENS) as server, caplog.at_level(logging.DEBUG):
        caplog.clear()
        for path, headers, answer in HANDSHAKES:
            got = upgrade(server, path.format(ALICE), *(header.format(ALICE) for header in headers))
            assert got.split()[1] == answer
        until(lambda: not server.server.server_state.tasks, "the end of them")
        records = list(caplog.records)
    assert [record.getMessage() for record in records if record.levelno >= logging.WARNING] == []
    lines = [record.getMessage() for record in records if record.levelno == logging.INFO]
    assert 0 < len(lines) <= len(HANDSHAKES)  # what is the same is not logged without end
    assert max(map(len, lines)) < 100
    assert ALICE not in "\n".join(record.getMessage() for record in records)


def test_what_is_no_websocket_is_closed_without_an_error_in_the_log(guarded, caplog):
    with caplog.at_level(logging.DEBUG):
        for then in (b"\x81\x82\0\0\0\0\xff\xff", b"\x83\x80\0\0\0\0", b"\x01\x81\0\0\0\0\xff\x80\x81\0\0\0\0\xff"):
            assert upgrade(guarded, "/v1/realtime", HOST, then=then).startswith("HTTP/1.1 101")
        until(lambda: not guarded.server.server_state.tasks, "the end of it")
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_query_is_not_logged_over_http_either(guarded, caplog):
    with caplog.at_level(logging.DEBUG), caplog.at_level(logging.DEBUG, logger="uvicorn.access"):
        for path in ("/v1/videos", "/readyz", "/nowhere", "/"):
            guarded.http.get(path, params={"token": ALICE})
    assert ALICE not in "\n".join(
        record.getMessage() for record in caplog.records if not record.name.startswith("http")
    )


@pytest.mark.parametrize(
    ("text", "mode", "complaint"),
    [
        (f"alice:{ALICE}\n", 0o640, "chmod 600"),
        (f"alice:{ALICE}\n", 0o604, "chmod 600"),
        ("# nothing\n", 0o600, "holds no token"),
        ("alice:short\n", 0o600, "line 1 .* at least 16"),
        (f"al ice:{ALICE}\n", 0o600, "line 1"),
        ("alice:with blanks in the midst\n", 0o600, "line 1"),
        (f"a:{ALICE}\nb:{ALICE}\n", 0o600, "line 2 .* earlier"),
        (f"a:{ALICE}\na:{BOB}\n", 0o600, "line 2 .* earlier"),
        ("alice:sch\xf6n-0123456789\n", 0o600, "cannot be read"),
    ],
)
def test_token_files_are_checked_and_not_quoted(text, mode, complaint, tmp_path):
    with pytest.raises(ConfigError, match=complaint) as raised:
        Tokens.from_file(token_file(tmp_path / "tokens", text, mode))
    assert ALICE not in str(raised.value)
    assert "short" not in str(raised.value)


def test_a_missing_token_file_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        Tokens.from_file(tmp_path / "tokens")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_beyond_loopback_tokens_are_needed(host, tmp_path):
    with pytest.raises(ConfigError, match="--tokens FILE"):
        ServerSettings(host=host)
    assert not ServerSettings(host=host, no_auth=True).on_loopback
    assert not ServerSettings(host=host, tokens=tmp_path).on_loopback


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_on_loopback_they_are_not(host):
    assert ServerSettings(host=host).on_loopback


@pytest.mark.parametrize(
    "wrong",
    [
        {"port": 65536},
        {"port": -1},
        {"max_sessions": 0},
        {"stall_s": 0},
        {"model_name": "a b"},
        {"allowed_origins": ("example.org",)},
    ],
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong)).replace("allowed_", "")[:6]):
        ServerSettings(**wrong)


# ---- hosts, origins, headers


@pytest.fixture(scope="module")
def server():
    with Running(allowed_origins=("https://studio.example",)) as running:
        yield running


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "localhost.evil"])
def test_other_names_of_a_loopback_server_are_refused(server, host):
    assert server.http.get("/healthz", headers={"Host": host}).status_code in (400, 421)
    with pytest.raises(InvalidStatus), server.realtime(additional_headers={"Host": host}):
        pass


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:1", "127.0.0.1:99", "[::1]:80", "[0:0:0:0:0:0:0:1]", "127.0.0.2:1", "127.255.1.2"]
)
def test_its_own_names_are_not(server, host):
    assert server.http.get("/healthz", headers={"Host": host}).status_code == 200


def test_a_name_can_be_allowed():
    with Running(allowed_hosts=("studio.example",)) as running:
        assert running.http.get("/healthz", headers={"Host": "studio.example"}).status_code == 200
        assert running.http.get("/healthz", headers={"Host": "evil.example"}).status_code == 421


@pytest.mark.parametrize("host", ["127.0.0.2", "127.8.9.10", "::1", "localhost"])
def test_a_server_answers_at_the_url_that_it_prints(host):
    with Running(host=host) as running:
        assert running.http.get("/readyz").status_code == 200
        assert (
            running.http.post("/v1/videos", json={"prompt": "a fox"}, headers={"Origin": running.url}).status_code
            == 200
        )
        with running.realtime(origin=running.url):
            pass


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("192.0.2.7:8000", 200),
        ("STUDIO.example", 200),
        ("studio.example:443", 200),
        ("xn--bcher-kva.example", 200),
        ("[2001:db8::1]", 200),
        ("localhost", 200),
        ("192.0.2.8", 421),
        ("evil.example", 421),
    ],
)
def test_with_allowed_hosts_a_server_is_called_by_them_and_by_the_address_that_it_listens_on(host, status):
    names = ("Studio.Example", "B\xfccher.example", "[2001:DB8:0::1]:443")
    settings = ServerSettings(host="192.0.2.7", no_auth=True, allowed_hosts=names)
    guard = RequestGuard(PlainTextResponse("served"), settings=settings, count=lambda code: None)
    assert TestClient(guard).get("/", headers={"Host": host}).status_code == status


@pytest.mark.parametrize(
    ("allowed", "sent"),
    [
        ("https://Studio.Example", "https://studio.example"),
        ("HTTPS://studio.example:443", "https://studio.example"),
        ("http://studio.example:80", "http://studio.example"),
        ("http://Studio.example:8080", "http://studio.example:8080"),
        ("https://studio.example", "https://Studio.Example:443"),
        ("https://b\xfccher.example", "https://xn--bcher-kva.example"),
        ("http://[2001:DB8:0::1]:80", "http://[2001:db8::1]"),
    ],
)
def test_allowed_origins_are_compared_as_browsers_spell_them(allowed, sent):
    with Running(allowed_origins=(allowed,)) as running:
        answer = running.http.post("/v1/videos", json={"prompt": "a fox"}, headers={"Origin": sent})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, sent)
        ours = {"Origin": sent, "Access-Control-Request-Method": "DELETE"}
        assert running.http.options("/v1/videos/x", headers=ours).status_code == 200
        with running.realtime(origin=sent):
            pass


@pytest.mark.parametrize(
    "origin",
    [
        *(
            "studio.example",
            "https://",
            "https://studio.example/",
            "https://studio.example/page",
            "https://studio.example?x",
        ),
        *(
            "https://me@studio.example",
            "ftp://studio.example",
            "null",
            "*",
            "https://*.example",
            "https://a b",
            "http://[x",
        ),
        *("https://studio.example:port", "https://studio.example:70000", "https://a..b", "https://" + "x" * 300),
    ],
)
def test_an_origin_that_is_none_is_refused(origin):
    with pytest.raises(ConfigError, match=r"an origin must be a scheme and a host, such as https://example\.org"):
        ServerSettings(allowed_origins=(origin,))


@pytest.mark.parametrize(
    "host", ["", "*", "http://studio.example", "studio.example/", "a b", "[::1", "a..b", "x" * 300]
)
def test_a_host_that_is_none_is_refused(host):
    with pytest.raises(ConfigError, match="a host must be a name or an address"):
        ServerSettings(allowed_hosts=(host,))


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://127.0.0.1:1", "https://studio.example.evil"]
)
def test_pages_of_other_origins_are_refused(server, origin):
    answer = server.http.post("/v1/videos", data={"prompt": "a fox"}, headers={"Origin": origin})
    assert answer.status_code == 403
    assert server.http.delete("/v1/videos/x", headers={"Origin": origin}).status_code == 403
    with pytest.raises(InvalidStatus, match="403"), server.realtime(origin=origin):
        pass


def test_its_own_pages_and_allowed_ones_are_served(server):
    for origin in (server.url, "https://studio.example", "HTTPS://Studio.Example"):
        assert server.http.post("/v1/videos", json={"prompt": "a fox"}, headers={"Origin": origin}).status_code == 200
        with server.realtime(origin=origin):
            pass


def test_answers_carry_security_headers(server):
    for path in ("/healthz", "/v1/videos", "/nowhere"):
        headers = server.http.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        policy = dict(part.strip().partition(" ")[::2] for part in headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == "'self'"
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["cache-control"] == "no-store"
        assert "server" not in headers


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("POST", "/healthz", 405),
        ("PUT", "/v1/videos", 405),
        ("GET", "/v1/videos/", 404),
        ("GET", "/docs", 404),
    ],
)
def test_errors_have_one_shape(server, method, path, status):
    answer = server.http.request(method, path)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_the_metrics_are_there_before_anything_happens(server):
    text = server.http.get("/metrics").text
    for name in (
        *("causalrt_first_frame_seconds_bucket", "causalrt_chunk_seconds_bucket", "causalrt_queue_length"),
        *("causalrt_sessions", "causalrt_kv_bytes", "causalrt_dropped_frames_total", "causalrt_jobs", "causalrt_ready"),
    ):
        assert re.search(f"^{name}[ {{]", text, re.MULTILINE), name
    for stage in ("whole", "queue", "text", "denoise", "exchange", "gather", "decode", "hand_over", "encode"):
        assert f'stage="{stage}"' in text


# ---- what nobody may read or break


@pytest.mark.parametrize("page", ["/", "/page.js", "/page.css"])
def test_a_page_is_its_own_file_whatever_is_asked(server, page, tmp_path):
    secret = tmp_path / "secret.js"
    secret.write_text("nobody's business")
    wanted = server.http.get(page)
    assert wanted.status_code == 200
    for query in ({"path": str(secret)}, {"path": "/etc/passwd"}, {"path": ""}, {"file": str(secret)}):
        answer = server.http.get(page, params=query)
        assert (answer.status_code, answer.content) == (200, wanted.content)
        later = {"If-Modified-Since": "Fri, 01 Jan 2038 00:00:00 GMT"}
        assert server.http.get(page, params=query, headers=later).status_code == 304


def test_no_route_outside_the_document_takes_parameters(server):
    documented = set(server.http.get("/openapi.json").json()["paths"])
    routes = server.server.config.app.routes
    assert len(routes) > len(documented)
    for route in routes:
        if isinstance(route, APIRoute) and route.path not in documented:
            assert (route.dependant.query_params, route.dependant.path_params) == ([], []), route.path


@pytest.mark.parametrize("origin", ["http://[x", "http://[", "://", "null", "http://" + "x" * 4000])
def test_a_malformed_origin_is_refused_and_counted(server, origin):
    def refused():
        text = server.http.get("/metrics").text
        return float(re.search(r'causalrt_errors_total{code="wrong_origin"} (\S+)', text)[1])

    server.http.post("/v1/videos", json={"prompt": "a fox"}, headers={"Origin": "http://evil.example"})
    before = refused()
    answer = server.http.post("/v1/videos", json={"prompt": "a fox"}, headers={"Origin": origin})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "wrong_origin")
    assert refused() == before + 1


def test_pages_of_allowed_origins_may_use_the_api():
    with Running(allowed_origins=("https://ours.example",)) as running:
        ours = {"Origin": "https://ours.example", "Access-Control-Request-Method": "POST"}
        answer = running.http.options("/v1/videos", headers=ours | {"Access-Control-Request-Headers": "authorization"})
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://ours.example"
        listed = running.http.get("/v1/videos", headers={"Origin": "https://ours.example"})
        assert listed.headers["access-control-allow-origin"] == "https://ours.example"
        theirs = running.http.get("/v1/videos", headers={"Origin": "https://theirs.example"})
        assert "access-control-allow-origin" not in theirs.headers


def test_owners_do_not_move_with_the_lines(tmp_path):
    before = Tokens.from_file(token_file(tmp_path / "one", f"{ALICE}\n{BOB}\n"))
    after = Tokens.from_file(token_file(tmp_path / "two", f"# alice has left\n\n{BOB}\n"))
    assert before.owner(BOB) == after.owner(BOB) != before.owner(ALICE)
    assert BOB not in after.owner(BOB)


def test_a_message_that_is_none_of_ours_is_not_echoed_at_length(server):
    with server.realtime() as client:
        client.send("x" * 60_000)
        assert len(client.next("error")["message"]) <= 300
