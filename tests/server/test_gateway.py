"""What routes share: inputs that are stored while others are swept away."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable

from server.app import create_app
from server.gateway import Gateway
from server.ledger import Ledger
from server.settings import Settings
from server.storage import Storage, input_key

DAY_S = 86400.0
Story = Callable[[Gateway, Ledger, Storage], Awaitable[None]]


def test_an_input_outlives_the_deletion_of_its_twin(app_settings: Settings) -> None:
    """The same bytes arrive between the decision to delete their old file and its deletion: they are still there."""

    async def story(gateway: Gateway, sweeper: Ledger, storage: Storage) -> None:
        first = await gateway.store_input(b"picture")
        doomed = await sweeper.sweep(time.time() + DAY_S)
        second = await gateway.store_input(b"picture")
        for key in doomed:
            await storage.delete(key)
        await sweeper.deleted(doomed)
        third = await gateway.store_input(b"picture")

        assert doomed == [first] and first == third == input_key(b"picture")
        assert storage.read(second) == storage.read(third) == b"picture"

    play(app_settings, story)


def test_a_file_that_is_being_deleted_is_no_input_any_more(app_settings: Settings) -> None:
    """A stored file is held by asking for it, unless the sweep was first."""

    async def story(gateway: Gateway, sweeper: Ledger, storage: Storage) -> None:
        key = await gateway.store_input(b"picture")
        answers = [await gateway.hold_stored(name) for name in (key, "up/nothing")]
        await sweeper.sweep(time.time() + DAY_S)

        assert answers == [True, False] and not await gateway.hold_stored(key)

    play(app_settings, story)


def play(settings: Settings, story: Story) -> None:
    """Run a story with a gateway, the ledger of a dispatcher beside it, and the store of both."""

    async def scene() -> None:
        app = create_app(settings)
        with contextlib.closing(Ledger.open(settings)) as ledger:
            async with app.router.lifespan_context(app):
                await story(app.state.gateway, ledger, Storage.open(settings))

    asyncio.run(scene())
