"""The endpoints this server has, by fal's id."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from server.endpoints.creative_upscaler import CREATIVE_UPSCALER
from server.endpoints.endpoint import Endpoint, Job

ENDPOINTS: Mapping[str, Endpoint[Any]] = {endpoint.id: endpoint for endpoint in (CREATIVE_UPSCALER,)}

__all__ = ["ENDPOINTS", "Endpoint", "Job"]
