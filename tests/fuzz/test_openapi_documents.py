"""Valid and invalid requests that schemathesis makes from the OpenAPI documents of both endpoints."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from fuzzing import ServedPair, fuzz
from hypothesis import given
from hypothesis import strategies as st

schemathesis = pytest.importorskip("schemathesis")

# The servers use ``random`` in a thread of this process, which Hypothesis takes for the strategy's doing.
pytestmark = pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisDeprecationWarning")


@cache
def operations(url: str) -> list[Any]:
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    return [found.ok() for found in schema.get_all_operations()]


def exercise(pair: ServedPair, url: str, data: st.DataObject) -> None:
    operation = data.draw(st.sampled_from(operations(url)), "operation")
    mode = data.draw(
        st.sampled_from([schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE])
    )
    try:
        strategy = operation.as_strategy(generation_mode=mode)
        case = data.draw(strategy, "request")
    except ValueError:  # an operation without parameters has no invalid request
        return
    given_request = case.as_transport_kwargs(base_url=url)
    given_request.pop("cookies", None)
    if given_request.get("data") is not None:
        given_request["content"] = given_request.pop("data")
    request = {k: v for k, v in given_request.items() if k in ("json", "content", "params", "headers")}
    method, target = given_request["method"], given_request["url"]
    response = pair.request(target, method, **request)
    if response.status_code >= 400 and response.status_code not in (404, 405) and "/v1/" in target:
        error = response.json()["error"]
        assert set(error) >= {"message", "type", "param", "code"}


def test_every_operation_is_in_the_documents(pair: ServedPair) -> None:
    paths = {operation.path for operation in operations(pair.server_url)}
    assert {"/v1/models", "/v1/completions", "/v1/chat/completions", "/health", "/ready"} <= paths
    assert "/v1/completions" in {operation.path for operation in operations(pair.edge_url)}


@fuzz(12)
@given(data=st.data())
def test_requests_of_the_servers_document(pair: ServedPair, data: st.DataObject) -> None:
    exercise(pair, pair.server_url, data)
    pair.logs.check()


@fuzz(12)
@given(data=st.data())
def test_requests_of_the_edges_document(pair: ServedPair, data: st.DataObject) -> None:
    exercise(pair, pair.edge_url, data)
    pair.logs.check()


def test_both_endpoints_still_answer_exactly(pair: ServedPair) -> None:
    pair.check()
