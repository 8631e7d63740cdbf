"""The OpenAPI document and the server agree, whatever is sent; nothing makes the server fail."""

import hashlib

import pytest
from support.fake_engine import FakeEngine
from support.running import Running

from causalrt.server.auth import Tokens

schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis: pip install '.[test]'")
hypothesis = pytest.importorskip("hypothesis")


TOKEN = "somebody-0123456789"


@pytest.fixture(scope="module")
def server():
    tokens = Tokens({hashlib.sha256(TOKEN.encode()).digest(): "somebody"})
    limits = {"generations_per_minute": 10**9, "max_queue": 1000, "max_jobs": 10**6}
    with Running(FakeEngine(), tokens=tokens, **limits) as running:
        running.http.headers["Authorization"] = f"Bearer {TOKEN}"
        yield running


@pytest.fixture(scope="module")
def document(server):
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


# A pattern cannot say how long a video may be, so "99" is refused though the document lets it through; and what a query has
# beside what is known is passed over, as is usual.
EXCLUDED = [schemathesis.checks.positive_data_acceptance, schemathesis.checks.negative_data_rejection]
POSITIVE, NEGATIVE = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
VIDEO = "/v1/videos/{video_id}"
WITH_INPUT = [
    ("POST", "/v1/videos"),
    ("GET", "/v1/videos"),
    ("GET", VIDEO),
    ("DELETE", VIDEO),
    ("GET", f"{VIDEO}/content"),
]
WITHOUT = [("GET", "/healthz"), ("GET", "/readyz"), ("GET", "/metrics")]


@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [(*operation, POSITIVE) for operation in WITH_INPUT + WITHOUT]
    + [(*operation, NEGATIVE) for operation in WITH_INPUT],
)
def test_whatever_is_sent_the_answer_is_documented(document, method, path, mode):
    operation = document[path][method]

    @hypothesis.settings(max_examples=25, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def check(case):
        case.call_and_validate(headers={"Authorization": f"Bearer {TOKEN}"}, excluded_checks=EXCLUDED)

    check()


def test_no_answer_was_a_server_error(server):
    counted = [
        line for line in server.http.get("/metrics").text.splitlines() if line.startswith("causalrt_errors_total{")
    ]
    assert any('code="invalid_value"' in line for line in counted)  # much was refused
    assert not any('code="internal"' in line for line in counted)


def test_the_document_names_what_it_should(server):
    paths = server.http.get("/openapi.json").json()["paths"]
    assert {path: sorted(operations) for path, operations in paths.items()} == {
        "/v1/videos": ["get", "post"],
        "/v1/videos/{video_id}": ["delete", "get"],
        "/v1/videos/{video_id}/content": ["get"],
        "/healthz": ["get"],
        "/readyz": ["get"],
        "/metrics": ["get"],
    }
    created = paths["/v1/videos"]["post"]["requestBody"]["content"]
    assert set(created) == {"application/json", "multipart/form-data"}
    assert set(created["application/json"]["schema"]["properties"]) == {"prompt", "model", "seconds", "size", "seed"}
