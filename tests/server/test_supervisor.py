"""The supervisor keeps its roles alive, stops them in order, and leaves nobody behind."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from server.settings import Settings
from server.supervisor import (
    CONFIGURATION_ERROR,
    AlreadyRunning,
    Role,
    SlotSpec,
    Supervisor,
    detect_gpus,
    plan_roles,
    plan_slots,
    read_server,
    settings_environment,
    sole_owner,
)

SLEEPER = """
import os, pathlib, signal, sys, time
from server import lifeline
lifeline.exit_when_cut(int(sys.argv[-1]))
diary = pathlib.Path(sys.argv[2])
def stop(*_):
    with diary.open("a") as file:
        file.write(f"stopped {sys.argv[1]}\\n")
    os._exit(0)
signal.signal(signal.SIGTERM, stop)
with diary.open("a") as file:
    file.write(f"started {sys.argv[1]}\\n")
time.sleep(300)
"""


def sleeper(name: str, diary: Path) -> Role:
    """A role that notes its start and stop, and does nothing between."""
    return Role(name=name, argv=[sys.executable, "-c", SLEEPER, name, str(diary)])


async def until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        await asyncio.sleep(0.02)


def lines_of(diary: Path) -> list[str]:
    return diary.read_text().splitlines() if diary.exists() else []


def test_roles_are_restarted_and_stopped_in_order(settings: Settings, tmp_path: Path) -> None:
    """A killed role comes back under another process id; SIGTERM stops the roles in the order given."""
    diary = tmp_path / "diary"
    settings.make_folders()

    async def scene() -> int:
        running = asyncio.create_task(Supervisor(settings, [sleeper("a", diary), sleeper("b", diary)]).run())
        await until(lambda: len(lines_of(diary)) == 2)
        file = settings.run_dir / "server.json"
        pid = json.loads(file.read_text())["roles"]["a"]
        os.kill(pid, signal.SIGKILL)
        await until(lambda: lines_of(diary).count("started a") == 2)
        await until(lambda: json.loads(file.read_text())["roles"]["a"] != pid)
        os.kill(os.getpid(), signal.SIGTERM)
        return await running

    status = asyncio.run(scene())

    assert status == 0
    assert lines_of(diary)[-2:] == ["stopped a", "stopped b"]
    assert not (settings.run_dir / "server.json").exists()


def test_a_role_that_cannot_be_helped_ends_the_server(settings: Settings, tmp_path: Path) -> None:
    """A configuration error of one role is the server's exit status; restarting would not change it."""
    settings.make_folders()
    hopeless = Role(name="b", argv=[sys.executable, "-c", f"raise SystemExit({CONFIGURATION_ERROR})"])

    status = asyncio.run(Supervisor(settings, [sleeper("a", tmp_path / "diary"), hopeless]).run())

    assert status == CONFIGURATION_ERROR


def test_a_supervisor_that_cannot_restart_a_role_ends(settings: Settings, tmp_path: Path) -> None:
    """A role whose program does not exist takes the server down with its error, instead of a server without it."""
    settings.make_folders()
    impossible = Role(name="b", argv=[str(tmp_path / "no such program")])

    with pytest.raises(FileNotFoundError):
        asyncio.run(Supervisor(settings, [sleeper("a", tmp_path / "diary"), impossible]).run())


def test_a_full_machine_does_not_end_the_server(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that cannot be started and a file that cannot be written are tried again until they can."""
    settings.make_folders()
    file = settings.run_dir / "server.json"
    faults = {
        Supervisor._start: [BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")] * 2,
        Supervisor._write_server_file: [OSError(errno.ENOSPC, "No space left on device")] * 2,
    }
    for method, errors in faults.items():

        def flawed(*args: Any, method: Callable[..., Any] = method, errors: list[OSError] = errors) -> Any:
            if errors:
                raise errors.pop()
            return method(*args)

        monkeypatch.setattr(Supervisor, method.__name__, flawed)

    async def scene() -> int:
        running = asyncio.create_task(Supervisor(settings, [sleeper("a", tmp_path / "diary")]).run())
        await until(lambda: lines_of(tmp_path / "diary") == ["started a"] and file.exists())
        os.kill(os.getpid(), signal.SIGTERM)
        return await running

    assert asyncio.run(scene()) == 0
    assert list(faults.values()) == [[], []]
    assert not file.exists()


def test_a_draft_that_does_not_fit_is_removed(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trying again on a full disk does not fill it further."""
    settings.make_folders()

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("server.supervisor.json.dump", fail)

    with pytest.raises(OSError, match="No space"):
        Supervisor(settings, [])._write_server_file()

    assert list(settings.run_dir.iterdir()) == []


def test_the_roles_die_with_a_killed_supervisor(settings: Settings, tmp_path: Path) -> None:
    """SIGKILL leaves no time to stop anybody; the lifeline does."""
    program = f"""
import asyncio, sys
from pathlib import Path
from server.settings import Settings
from server.supervisor import Supervisor
from tests.server.test_supervisor import sleeper
settings = Settings(data={str(settings.data)!r})
settings.make_folders()
asyncio.run(Supervisor(settings, [sleeper("a", Path({str(tmp_path / "diary")!r}))]).run())
"""
    supervisor = subprocess.Popen([sys.executable, "-c", program])
    asyncio.run(until(lambda: lines_of(tmp_path / "diary") == ["started a"]))
    pid = json.loads((settings.run_dir / "server.json").read_text())["roles"]["a"]

    supervisor.kill()
    supervisor.wait()

    def is_gone() -> bool:
        return not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text()

    asyncio.run(until(is_gone, 2.0))
    assert is_gone()


def test_a_data_folder_has_one_server(settings: Settings) -> None:
    """A second server on the same folder is refused, with a way out; when the first is gone it may start."""
    with sole_owner(settings):
        assert read_server(settings) is None, "it has not said anything yet"
        with pytest.raises(AlreadyRunning, match="--data"), sole_owner(settings):
            pass

    with sole_owner(settings):
        pass
    assert read_server(settings) is None


@pytest.mark.parametrize(("slots", "expected"), [("auto", ["3", "5"]), (3, ["3", "5", "3"]), (1, ["3"])])
def test_slots_are_dealt_out_over_gpus(settings: Settings, slots: int | str, expected: list[str]) -> None:
    """One slot per GPU unless a number is given."""
    plan = plan_slots(settings.model_copy(update={"slots": slots}), ["3", "5"])

    assert [slot.gpu for slot in plan] == expected
    assert {slot.device for slot in plan} == {"cuda"}


def test_a_machine_without_gpu_has_one_slot_on_the_processor(settings: Settings) -> None:
    """Without GPUs there is one slot, on the CPU."""
    assert [(slot.id, slot.device) for slot in plan_slots(settings, [])] == [("0", "cpu")]


@pytest.mark.parametrize(("value", "expected"), [("", []), ("-1", []), ("0,2", ["0", "2"]), ("GPU-ab12", ["GPU-ab12"])])
def test_visible_devices_limit_the_gpus(monkeypatch: pytest.MonkeyPatch, value: str, expected: list[str]) -> None:
    """What the operator hides is not used."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)

    assert detect_gpus() == expected


def test_roles_run_on_the_settings_of_the_supervisor(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What came from the command line reaches every role through its environment, lists and secrets included."""
    chosen = Settings(
        data=tmp_path / "x",
        port=1234,
        api_keys=["a,b", "c"],
        allow_unauthenticated=True,
        fetch_tokens={"huggingface.co": SecretStr("hf_secret")},
        operator_key=SecretStr("of the operator, alone"),
    )
    for name, value in settings_environment(chosen).items():
        monkeypatch.setenv(name, value)

    assert Settings() == chosen


def test_each_slot_sees_its_own_gpu(settings: Settings) -> None:
    """A slot's process is shown one GPU, under the name `cuda`; the dispatcher knows every slot."""
    roles = plan_roles(settings, [SlotSpec(id="0", gpu="3"), SlotSpec(id="1", gpu="5")])

    assert [role.name for role in roles] == ["dispatcher", "gateway", "slot-0", "slot-1"]
    assert roles[0].argv[-2:] == ["--slots", "0,1"]
    assert [role.env["CUDA_VISIBLE_DEVICES"] for role in roles[2:]] == ["3", "5"]


def test_threads_on_the_processor_do_not_spin(settings: Settings) -> None:
    """A slot on the CPU shares it with the other roles, so its idle threads sleep."""
    (slot,) = plan_roles(settings, [SlotSpec(id="0", gpu=None)])[2:]

    assert slot.env["OMP_WAIT_POLICY"] == "PASSIVE"
