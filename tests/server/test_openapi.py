"""Whatever fits the OpenAPI document, or just does not, is never a fault of the server's."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode


def _probe(served, num_examples: int) -> int:
    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    for operation in operations:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

            @settings(
                max_examples=num_examples, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def probe(case):
                assert case.call().status_code < 500, case.as_curl_command()

            try:
                probe()
            except (Unsatisfiable, schemathesis.errors.SchemathesisError) as error:
                # An operation without anything to give wrongly.
                assert mode is GenerationMode.NEGATIVE, error
    return len(operations)


def test_no_request_makes_a_server_error(served):
    assert _probe(served, 3) >= 25


@pytest.mark.slow
def test_none_of_many_requests_makes_a_server_error(served):
    _probe(served, 100)
