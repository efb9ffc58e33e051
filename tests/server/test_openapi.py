"""Whatever fits the OpenAPI document, or just does not, is never a fault of the server's."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error

_RELAXED = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}


@pytest.fixture
def api(served):
    return schemathesis.openapi.from_url(f"{served.url}/openapi.json")


schema = schemathesis.pytest.from_fixture("api")


@schema.parametrize()
@settings(max_examples=4, **_RELAXED)
def test_no_request_makes_a_server_error(case):
    case.call_and_validate(checks=[not_a_server_error])


@pytest.mark.slow
@schema.parametrize()
@settings(max_examples=200, **_RELAXED)
def test_none_of_many_requests_makes_a_server_error(case):
    case.call_and_validate(checks=[not_a_server_error])
