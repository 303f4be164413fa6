"""Starts gateway, dispatcher and slots, restarts what dies, and takes all of them along when it ends.

The roles are processes of their own: one that crashes costs what it was doing, not the server. They hold a lifeline to
this process (`lifeline.py`), so a supervisor that is killed leaves nobody behind that could work against its successor.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog
from pydantic import SecretStr

from server import lifeline
from server.settings import Settings

CONFIGURATION_ERROR = 78
"""Exit status (EX_CONFIG) of a role that no restart can help; it ends the server."""

FIRST_DELAY_S = 0.1
MAX_DELAY_S = 10.0
SETTLED_S = 10.0
"""Seconds after which a role counts as running well, so that its next death is restarted at once."""

GATEWAY_STOP_S = 10.0
LOCK_TRIES = 5

PATIENT_THREADS = {"OMP_WAIT_POLICY": "PASSIVE"}
"""OpenMP's threads sleep at barriers: where others compute as well, spinning ones were measured four times slower."""

QUIET_LIBRARIES = {"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}
"""They write lines of their own into our log, at import, about what is as it should be."""

log = structlog.get_logger()


class AlreadyRunning(Exception):
    """Another server uses this data folder."""


@dataclass(frozen=True, kw_only=True)
class Role:
    """A child process; `stop_s` is how many seconds it has to end when asked to."""

    name: str
    argv: list[str]
    env: dict[str, str] = field(default_factory=dict)
    stop_s: float = 5.0


@dataclass(frozen=True, kw_only=True)
class SlotSpec:
    """A slot to start; `gpu` is the value for CUDA_VISIBLE_DEVICES, None on the CPU."""

    id: str
    gpu: str | None

    @property
    def device(self) -> str:
        """Torch's name of the device inside the slot's process."""
        return "cpu" if self.gpu is None else "cuda"


def detect_gpus() -> list[str]:
    """The NVIDIA GPUs that a slot may use, as CUDA_VISIBLE_DEVICES names them; does not need torch or a driver."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() and name.strip() != "-1"]
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        listing = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        # A container may have the device without the tool.
        return sorted(path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*"))
    return [line.strip() for line in listing.splitlines() if line.strip().isdecimal()]


def plan_slots(settings: Settings, gpus: Sequence[str]) -> list[SlotSpec]:
    """One slot per GPU, or one on the CPU; a number in the settings overrides it and is dealt out over the GPUs."""
    count = max(1, len(gpus)) if settings.slots == "auto" else settings.slots
    return [SlotSpec(id=str(n), gpu=gpus[n % len(gpus)] if gpus else None) for n in range(count)]


def settings_environment(settings: Settings) -> dict[str, str]:
    """The settings as environment variables, so that every role runs on what this process decided."""
    chosen = settings.model_dump(exclude_unset=True, exclude_none=True)
    plain: dict[str, Any] = json.loads(json.dumps(chosen | {"data": settings.data}, default=_plainly))
    return {
        f"UPSCALER_{name.upper()}": value if isinstance(value, str) else json.dumps(value)
        for name, value in plain.items()
    }


def _plainly(value: Any) -> str:
    """A path or a secret as the text that it is read from."""
    return value.get_secret_value() if isinstance(value, SecretStr) else str(value)


def plan_roles(settings: Settings, slots: Sequence[SlotSpec]) -> list[Role]:
    """The processes of a server, in the order in which they are stopped."""
    python = [sys.executable, "-m", "server"]
    env = settings_environment(settings)
    slot_ids = ",".join(slot.id for slot in slots)
    return [
        # First the one that waits for what runs; callers can ask for it until it is done.
        Role(
            name="dispatcher",
            argv=[*python, "dispatcher", "--slots", slot_ids],
            env=env,
            stop_s=settings.drain_s + 5.0,
        ),
        Role(name="gateway", argv=[*python, "gateway"], env=env, stop_s=GATEWAY_STOP_S),
        *(
            Role(
                name=f"slot-{slot.id}",
                argv=[*python, "slot", slot.id, "--device", slot.device],
                env=env | QUIET_LIBRARIES | device_environment(slot),
            )
            for slot in slots
        ),
    ]


def device_environment(slot: SlotSpec) -> dict[str, str]:
    """What shows a slot its device alone."""
    return PATIENT_THREADS if slot.gpu is None else {"CUDA_VISIBLE_DEVICES": slot.gpu}


def server_file(settings: Settings) -> Path:
    """Where a running server tells where it is; its readers are `env` and people."""
    return settings.run_dir / "server.json"


def read_server(settings: Settings) -> dict[str, Any] | None:
    """What the server on this data folder says of itself; None when none runs."""
    with contextlib.suppress(OSError, ValueError), lock_path(settings).open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            found: dict[str, Any] = json.loads(server_file(settings).read_text())
            return found
    return None


def lock_path(settings: Settings) -> Path:
    """The lock that the one supervisor of a data folder holds."""
    return settings.data / "supervisor.lock"


@contextlib.contextmanager
def sole_owner(settings: Settings) -> Iterator[None]:
    """Hold the data folder; raises `AlreadyRunning` when another server does."""
    settings.make_folders()
    with lock_path(settings).open("a") as lock:
        for _ in range(LOCK_TRIES):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                time.sleep(0.1)  # `env` or `doctor` may hold it for the moment in which they look
        else:
            running = read_server(settings) or {}
            raise AlreadyRunning(
                f"A server runs on {settings.data} already (process {running.get('pid', 'unknown')}); "
                "stop it, or choose another folder with --data."
            )
        yield


class Supervisor:
    """Keeps the roles alive until it is told to stop."""

    def __init__(self, settings: Settings, roles: Sequence[Role]) -> None:
        self._settings, self._roles = settings, roles
        self._children: dict[str, asyncio.subprocess.Process] = {}
        self._stopping = asyncio.Event()
        self._status = 0

    async def run(self) -> int:
        """Start everything and wait for SIGTERM or SIGINT; returns the exit status of the server."""
        line = lifeline.create()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopping.set)
        keepers = {role.name: asyncio.create_task(self._keep(role, line)) for role in self._roles}
        # A keeper that fails cannot restart its role any more; half a server is worse than none.
        await asyncio.wait(
            [asyncio.create_task(self._stopping.wait()), *keepers.values()], return_when="FIRST_COMPLETED"
        )
        self._stopping.set()
        failures = [task.exception() for task in keepers.values() if task.done() and not task.cancelled()]
        for role in self._roles:
            await self._stop(role, keepers[role.name])
        server_file(self._settings).unlink(missing_ok=True)
        for end in line:
            os.close(end)
        for failure in failures:
            if failure is not None:
                raise failure
        return self._status

    async def _keep(self, role: Role, line: lifeline.Lifeline) -> None:
        """Start a role whenever it does not run, later and later while it dies young."""
        delay_s = FIRST_DELAY_S
        while True:
            started = time.monotonic()
            try:
                child = await self._start(role, line)
            except (FileNotFoundError, NotADirectoryError, PermissionError):
                raise
            except OSError as error:  # no process, memory or descriptor to be had: another time there may be
                delay_s = min(delay_s * 2, MAX_DELAY_S)
                log.error("role_not_started", role=role.name, error=str(error), retry_in_s=delay_s)
                await asyncio.sleep(delay_s)
                continue
            self._children[role.name] = child
            self._publish()
            status = await child.wait()
            if self._stopping.is_set():
                return
            if status == CONFIGURATION_ERROR:
                self._status = status
                self._stopping.set()
                return
            lived_s = time.monotonic() - started
            delay_s = FIRST_DELAY_S if lived_s > SETTLED_S else min(delay_s * 2, MAX_DELAY_S)
            log.warning("role_died", role=role.name, status=status, lived_s=round(lived_s, 1), restart_in_s=delay_s)
            await asyncio.sleep(delay_s)

    async def _start(self, role: Role, line: lifeline.Lifeline) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *role.argv,
            "--lifeline",
            str(line.read_fd),
            stdin=subprocess.DEVNULL,
            env=os.environ | role.env,
            pass_fds=(line.read_fd,),
            # Ctrl-C at a terminal goes to the whole group; the order of stopping is ours.
            start_new_session=True,
        )

    async def _stop(self, role: Role, keeper: asyncio.Task[None]) -> None:
        child = self._children.get(role.name)
        if child is None or child.returncode is not None:
            keeper.cancel()
        else:
            child.terminate()
            try:
                await asyncio.wait_for(child.wait(), role.stop_s)
            except TimeoutError:
                log.warning("role_killed", role=role.name, reason=f"still running after {role.stop_s:g} s")
                child.kill()
        await asyncio.gather(keeper, return_exceptions=True)

    def _publish(self, delay_s: float = FIRST_DELAY_S) -> None:
        """Write down where the server is; later when it cannot be done now, because the server works without it."""
        if self._stopping.is_set():
            return
        try:
            self._write_server_file()
        except OSError as error:
            log.error("server_file_not_written", error=str(error), retry_in_s=delay_s)
            asyncio.get_running_loop().call_later(delay_s, self._publish, min(delay_s * 2, MAX_DELAY_S))

    def _write_server_file(self) -> None:
        settings = self._settings
        facts = {
            "pid": os.getpid(),
            "host": settings.host,
            "port": settings.port,
            "tls_port": settings.tls_port,
            "fal_proxy_port": settings.fal_proxy_port,
            "public_url": settings.public_url,
            "trust_dir": str(settings.trust_dir),
            "own_ca": settings.tls_cert is None,
            "key": next(iter(settings.api_keys), None),
            "roles": {name: child.pid for name, child in self._children.items()},
        }
        path = server_file(settings)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as draft:
            try:
                json.dump(facts, draft, indent=2)
                draft.flush()
                Path(draft.name).replace(path)
            except OSError:
                Path(draft.name).unlink(missing_ok=True)
                raise
