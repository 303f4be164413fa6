"""Bodies of the queue API, and files as URLs in them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from server.ledger import LogRow, RequestRow
from server.schemas import Base, log_entry, result_bytes, status_body, timestamp, with_urls

BASE = Base("https://box:8443", "https://box:8443/queue")


def row(**changes: Any) -> RequestRow:
    """A request that is over and went well, changed as told."""
    fields: dict[str, Any] = dict.fromkeys(RequestRow.__dataclass_fields__) | {
        "seq": 1,
        "id": "some-id",
        "endpoint": "owner/alias",
        "state": "COMPLETED",
        "outcome_status": 200,
        "outcome_json": '{"image":{"url":"blob:out/ab/x.png"},"note":"say \\"blob: ahoy"}',
    }
    return RequestRow(**(fields | changes))


def test_files_become_urls_and_nothing_else_does() -> None:
    """Only a string that begins with the marker is a file of ours; the fast way and the slow way agree."""
    body = json.loads(row().outcome_json or "")

    assert json.loads(result_bytes(row(), BASE.root)) == with_urls(body, BASE.root)
    assert with_urls(body, BASE.root) == {
        "image": {"url": "https://box:8443/files/out/ab/x.png"},
        "note": 'say "blob: ahoy',
    }
    assert with_urls(["blob:a", 1, None], "http://h") == ["http://h/files/a", 1, None]


def test_errors_are_sent_as_they_were_stored() -> None:
    """What a caller sent and gets back as `input` is never taken for a file."""
    stored = '{"detail":[{"input":"blob:in/x"}]}'

    assert result_bytes(row(outcome_status=422, outcome_json=stored), BASE.root) == stored.encode()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"state": "IN_QUEUE", "queue_position": 0}, {"status": "IN_QUEUE", "queue_position": 0}),
        ({"state": "IN_PROGRESS"}, {"status": "IN_PROGRESS"}),
        ({"inference_s": 1.25}, {"status": "COMPLETED", "metrics": {"inference_time": 1.25}}),
        (
            {"error": "no", "error_type": "image_load_error"},
            {"status": "COMPLETED", "metrics": {}, "error": "no", "error_type": "image_load_error"},
        ),
    ],
)
def test_a_status_has_the_keys_of_its_state(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    """Ids, URLs and `logs` always; position, metrics and error where they belong."""
    url = "https://box:8443/queue/owner/alias/requests/some-id"

    assert status_body(BASE, row(**changes), None) == expected | {
        "request_id": "some-id",
        "response_url": url,
        "status_url": f"{url}/status",
        "cancel_url": f"{url}/cancel",
        "logs": None,
    }


def test_log_lines_have_times_and_known_levels() -> None:
    """RFC 3339 in UTC; a level that clients do not know is INFO."""
    assert timestamp(0.5) == "1970-01-01T00:00:00.500Z"
    assert log_entry(LogRow(1, 0.0, "NOTICE", "x"))["level"] == "INFO"
    assert log_entry(LogRow(1, 0.0, "WARN", "x"))["labels"] == {"level": "WARN", "source": "USER"}
