"""What /openapi.json describes is what is served: requests that schemathesis makes of it never fail the server."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from fireflyer.serve.app import create_app
from fireflyer.serve.settings import ServeSettings

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
EXAMPLES = {GenerationMode.POSITIVE: 120, GenerationMode.NEGATIVE: 80}


@pytest.mark.parametrize("mode", list(EXAMPLES), ids=lambda mode: mode.value)
def test_no_described_request_fails(real_engine, mode):
    """Valid and invalid ones, of every operation; /ready is left out, for it is 503 until the first steps are done."""
    app = create_app(real_engine, ServeSettings("tiny", max_output_tokens=4, max_n=3))
    operations = [found.ok() for found in schemathesis.openapi.from_asgi("/openapi.json", app).get_all_operations()]
    assert len(operations) > 8
    tried = 0
    for operation in operations:
        if operation.path == "/ready" or (mode is GenerationMode.NEGATIVE and operation.method == "get"):
            continue

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=EXAMPLES[mode],
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
            database=None,
        )
        def check(case):
            nonlocal tried
            tried += 1
            case.call_and_validate(checks=CHECKS)

        check()
    assert tried > 250
