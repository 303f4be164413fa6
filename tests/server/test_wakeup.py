"""Bells wake waiters, never block a ringer, and outlive a crashed listener."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

from server.wakeup import Bell, Ringer, ring


def test_a_ring_wakes_every_waiter(tmp_path: Path) -> None:
    """All tasks that wait on a bell are woken by one ring."""

    async def story() -> list[bool]:
        bell = Bell(tmp_path, "gateway")
        waiters = [asyncio.create_task(bell.wait(5.0)) for _ in range(3)]
        await asyncio.sleep(0.01)
        ring(tmp_path, "gateway")
        woken = await asyncio.gather(*waiters)
        bell.close()
        return woken

    assert asyncio.run(story()) == [True, True, True]


def test_a_ring_before_the_wait_is_not_lost(tmp_path: Path) -> None:
    """A ring that comes while nobody waits ends the next wait at once, and only that one."""

    async def story() -> tuple[bool, bool]:
        bell = Bell(tmp_path, "dispatcher")
        await bell.wait(0.01)
        ring(tmp_path, "dispatcher")
        await asyncio.sleep(0.05)
        first, second = await bell.wait(5.0), await bell.wait(0.01)
        bell.close()
        return first, second

    assert asyncio.run(story()) == (True, False)


def test_ringing_without_a_listener_is_harmless(tmp_path: Path) -> None:
    """A ringer does not notice whether somebody listens."""
    ring(tmp_path, "nobody")

    assert list(tmp_path.iterdir()) == []


def test_a_bell_takes_over_from_a_dead_process(tmp_path: Path) -> None:
    """A socket file that a crashed process left behind does not stop its successor."""
    left_behind = Bell(tmp_path, "dispatcher")
    successor = Bell(tmp_path, "dispatcher")

    async def story() -> bool:
        waiting = asyncio.create_task(successor.wait(5.0))
        await asyncio.sleep(0.01)
        ring(tmp_path, "dispatcher")
        return await waiting

    assert asyncio.run(story())
    left_behind.close()
    successor.close()


def test_a_full_bell_does_not_block_the_ringer(tmp_path: Path) -> None:
    """Ten thousand rings nobody hears return at once, and the bell has rung."""

    async def story() -> bool:
        with contextlib.closing(Bell(tmp_path, "slow")) as bell:
            for _ in range(10_000):
                ring(tmp_path, "slow")
            return await bell.wait(5.0)

    assert asyncio.run(story())


def test_a_ringer_finds_every_bell_of_its_name(tmp_path: Path) -> None:
    """A socket that is kept rings whoever listens at the moment, also one who came later; nobody is no error."""

    async def story() -> list[bool]:
        heard = []
        with contextlib.closing(Ringer(tmp_path, "dispatcher")) as ringer:
            ringer.ring()
            for _ in range(2):
                bell = Bell(tmp_path, "dispatcher")
                ringer.ring()
                heard.append(await bell.wait(5.0))
                bell.close()
        return heard

    assert asyncio.run(story()) == [True, True]
