"""The queue client of fal's SDK, unmodified; it installs many packages, hence only on request."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.clients import confined, installed
from tests.acceptance.live import LiveServer, finish

RELEASE = "fal==1.83.0"

pytestmark = pytest.mark.slow


def test_the_sdks_queue_client_works(paced: LiveServer, arguments: Callable[..., dict[str, Any]]) -> None:
    """It tells pending from completed by the status code, asks with a slash at the end, and gets the picture."""
    folder = installed(RELEASE)
    text = json.dumps(arguments(num_inference_steps=20))

    answer = finish(paced.client(text, program="sdk_client.py", environment=confined(paced.client_environment, folder)))

    assert Path(answer["package"]).is_relative_to(folder)
    assert answer["states"] and set(answer["states"]) <= {"Queued", "InProgress"}
    assert answer["last"] == ["Completed", None]
    assert any("denoise" in line for line in answer["logs"])
    for result in (answer["result"], answer["run"]):
        assert (result["image"]["width"], result["seed"]) == (128, 1)
    assert answer["refused"] == {"status": 422, "last": ["Completed", "less_than_equal"]}
