"""Random requests from the server's own OpenAPI document: no answer is a server error or other than declared."""

from __future__ import annotations

import pytest

from benchmarks.fuzz import Findings, fuzz
from server.settings import Settings

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:schemathesis.*")


def test_answers_are_as_declared(app_settings: Settings) -> None:
    """Some hundred requests, valid and invalid, all over the API: each answer fits the document and the data."""
    findings = Findings()

    fuzz(app_settings, findings, max_examples=2, seed=1)

    assert findings.num_cases > 300
    assert findings.faults == {}
