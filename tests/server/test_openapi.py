"""The OpenAPI document is true: whatever fits it, or just does not, is answered as it says, and never with a fault of
the server's."""

from __future__ import annotations

import re

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import load_all_checks

load_all_checks()
CHECKS = [
    check
    for check in schemathesis.checks.CHECKS.get_all()
    if check.__name__
    in ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance")
]


def _probe(served, num_examples: int) -> int:
    assert len(CHECKS) == 4
    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    for operation in operations:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

            @settings(
                max_examples=num_examples,
                deadline=None,
                suppress_health_check=list(HealthCheck),
                derandomize=True,
                # A failure is as plain unshrunk.
                phases=(Phase.explicit, Phase.generate),
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def probe(case):
                case.call_and_validate(checks=CHECKS)

            try:
                probe()
            except (Unsatisfiable, schemathesis.errors.SchemathesisError) as error:
                # An operation without anything to give wrongly.
                assert mode is GenerationMode.NEGATIVE, error
    return len(operations)


def test_every_answer_is_as_the_document_says(served):
    assert _probe(served, 2) >= 30


@pytest.mark.slow
def test_every_one_of_many_answers_is_as_the_document_says(served):
    _probe(served, 100)


def test_faults_have_the_shape_that_the_document_tells(served):
    document = served.http.get("/openapi.json").json()
    assert "HTTPValidationError" not in document["components"]["schemas"]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert "422" not in operation["responses"], (method, path)
    create = document["paths"]["/v1/responses"]["post"]
    assert set(create["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    assert document["paths"]["/health"]["get"]["security"] == [] and document["security"][0] == {}


def test_the_docs_name_every_endpoint_and_need_nothing_from_elsewhere(served):
    document = served.http.get("/openapi.json").json()
    page = served.http.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    for path in document["paths"]:
        assert f"<code>{path}</code>" in page.text
    assert "max_output_tokens" in page.text and "gpt-oss-20b" in page.text
    assert "<script" not in page.text
    assert re.findall(r"""(?:src|href)=["']?([^"'> ]+)""", page.text) == ["/openapi.json"]
