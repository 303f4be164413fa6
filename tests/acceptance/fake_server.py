"""`serve` with slots that run the fake pipeline: for tests of processes, where the picture does not matter.

Started as `python -m tests.acceptance.fake_server serve`, it starts its slots as `… slot ID --device cpu`.
"""

from __future__ import annotations

import asyncio
import os
import sys
from dataclasses import replace

from server.__main__ import configure_logging, run_role, start_role
from server.settings import Settings
from server.slot import serve_slot
from server.supervisor import SlotSpec, Supervisor, plan_roles, sole_owner
from tests.server.fake_pipeline import PIPELINES


def serve() -> int:
    """The supervisor, with the slots' commands pointing here."""
    settings = Settings()
    configure_logging(settings, "supervisor")
    roles = [
        replace(role, argv=[sys.executable, "-m", __spec__.name, *role.argv[3:]]) if "slot-" in role.name else role
        for role in plan_roles(settings, [SlotSpec(id="0", gpu=None)])
    ]
    with sole_owner(settings):
        return asyncio.run(Supervisor(settings, roles).run())


def slot(slot_id: str, lifeline_fd: int) -> None:
    """A slot whose table of pipelines is the fake one."""
    settings = start_role(lifeline_fd, f"slot-{slot_id}")
    run_role(serve_slot(settings, slot_id, "cpu", PIPELINES))
    os._exit(0)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        sys.exit(serve())
    slot(sys.argv[2], int(sys.argv[sys.argv.index("--lifeline") + 1]))
