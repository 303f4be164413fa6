"""Which loaded models stay where: on the device, in host memory, or on disk only.

Three levels, each with a budget of bytes but the last. What is used comes to the device; what it displaces goes one
level down, the least valuable first. The value of a model is how often it was used times the seconds it takes to load,
per byte, and what was not used for long is overtaken by what is (the rule of GreedyDual-Size-Frequency). Weights never
change, so a copy in host memory stays good: coming back is one copy to the device, going again costs nothing.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")

OURS = ("pipelines.", "weights.", "tests.")
"""Objects of these packages are looked into for modules."""


class Level(Enum):
    """Where a model is."""

    DEVICE = "device"
    HOST = "host"


@dataclass(frozen=True, kw_only=True)
class Holding:
    """A loaded model, for people: `users` are the kinds of requests that used it when they last ran."""

    key: str
    level: Level
    size_bytes: int
    users: tuple[str, ...]


@dataclass(kw_only=True)
class Counts:
    """What happened since the beginning."""

    loads: int = 0
    load_s: float = 0.0
    moves_to_host: int = 0
    moves_to_disk: int = 0
    returns: int = 0


@dataclass(eq=False)
class _Resident:
    """A loaded model.

    Attributes:
        thing: What its loader returned.
        modules: The modules in it.
        size_bytes: Of all their numbers.
        load_s: Seconds its loading took.
        value: What it is worth to keep; comparable between models.
        copies: Its numbers in host memory, by tensor, once they were there.
    """

    thing: Any
    modules: list[nn.Module]
    size_bytes: int
    load_s: float
    level: Level = Level.DEVICE
    uses: int = 0
    value: float = 0.0
    copies: dict[int, Tensor] = field(default_factory=dict)


class Residency:
    """Keeps models within budgets of bytes; used by one thread.

    Args:
        device: Where models compute.
        device_bytes: Budget on the device; exceeded rather than failing what runs or is waited for.
        host_bytes: Budget in host memory, for models that are not on the device. On a CPU the two levels are one
            memory, and going from one to the other costs nothing.
    """

    def __init__(self, device: torch.device, *, device_bytes: int, host_bytes: int) -> None:
        self._is_apart = device.type != "cpu"
        self.device, self._budgets = device, {Level.DEVICE: device_bytes, Level.HOST: host_bytes}
        self._residents: dict[str, _Resident] = {}
        self._in_use: set[str] = set()
        self._keys_of: dict[str, set[str]] = {}
        self._expected: frozenset[str] = frozenset()
        self._age = 0.0
        self.counts = Counts()

    def get(self, key: str, load: Callable[[], T], *, size_bytes: int = 0) -> T:
        """A model on the device: as it is there, from host memory, or loaded.

        Args:
            key: Which model.
            load: Brings it onto the device.
            size_bytes: About how much room it will need there, to be made before it is loaded.
        """
        self._in_use.add(key)
        # What outlives this request, copies of weights included, must not belong to its inference mode.
        with torch.inference_mode(False), torch.no_grad():
            resident = self._residents.get(key)
            if resident is None:
                self._make_room(Level.DEVICE, size_bytes)
                resident = self._brought(lambda: self._loaded(load))
                self._residents[key] = resident
                self.counts.loads += 1
                self.counts.load_s += resident.load_s
            elif resident.level is Level.HOST:
                self._make_room(Level.DEVICE, resident.size_bytes)
                self._brought(partial(self._raise, resident))
                self.counts.returns += 1
            resident.uses += 1
            resident.value = self._age + resident.uses * resident.load_s / max(resident.size_bytes, 1)
            self._make_room(Level.DEVICE, 0)
        return resident.thing

    @contextmanager
    def request(self, kind: str) -> Iterator[None]:
        """While it runs, what a request has asked for stays where it is; `kind` names requests with the same needs."""
        self._in_use = set()
        try:
            yield
        finally:
            self._keys_of[kind] = self._in_use
            self._in_use = set()

    def expect(self, kinds: Iterable[str]) -> None:
        """Say which kinds of requests are queued: what they used before stays until they have run."""
        self._expected = frozenset(key for kind in kinds for key in self._keys_of.get(kind, ()))

    def holdings(self) -> list[Holding]:
        """What is loaded; may be asked for on another thread."""
        users = {kind: frozenset(keys) for kind, keys in list(self._keys_of.items())}
        return [
            Holding(
                key=key,
                level=resident.level,
                size_bytes=resident.size_bytes,
                users=tuple(sorted(kind for kind, keys in users.items() if key in keys)),
            )
            for key, resident in list(self._residents.items())
        ]

    def drop(self, is_meant: Callable[[str], bool]) -> list[str]:
        """Forget the models that requests of the kinds that are meant used, and no others; returns their keys.

        They are on disk only, until somebody wants them again.
        """
        meant = {kind for kind in self._keys_of if is_meant(kind)}
        used = set().union(*(self._keys_of.pop(kind) for kind in meant))
        kept = set().union(*self._keys_of.values())
        dropped = [key for key in self._residents if key in used - kept]
        self._forget(dropped)
        return dropped

    def drop_all(self) -> list[str]:
        """Forget every model; returns their keys."""
        dropped = list(self._residents)
        self._keys_of.clear()
        self._forget(dropped)
        return dropped

    def _forget(self, keys: Iterable[str]) -> None:
        for key in keys:
            del self._residents[key]
            self.counts.moves_to_disk += 1
        self._in_use -= set(keys)
        self._release()

    def level_of(self, key: str) -> Level | None:
        """Where a model is; None when it is on disk only."""
        resident = self._residents.get(key)
        return None if resident is None else resident.level

    def used_bytes(self, level: Level) -> int:
        """Bytes of the models on a level; in host memory also the copies of those that are on the device again."""
        return sum(
            resident.size_bytes
            for resident in self._residents.values()
            if resident.level is level or (level is Level.HOST and resident.copies)
        )

    @staticmethod
    def _loaded(load: Callable[[], Any]) -> _Resident:
        started = time.perf_counter()
        thing = load()
        modules = modules_in(thing)
        return _Resident(thing, modules, _bytes_of(modules), time.perf_counter() - started)

    def _brought(self, bring: Callable[[], T]) -> T:
        """What `bring` brings onto the device; where it finds no room, once more when all else has been moved."""
        try:
            return bring()
        except torch.OutOfMemoryError:
            pass  # and only then: what was half loaded is held by the error
        self._make_room(Level.DEVICE, self._budgets[Level.DEVICE])
        self._release()
        return bring()

    def _make_room(self, level: Level, size_bytes: int) -> None:
        """Move models down until so many bytes are free on a level, or only what is needed is left there."""
        while self.used_bytes(level) + size_bytes > self._budgets[level]:
            if level is Level.HOST and self._dropped_copy():
                continue
            movable = [
                (resident.value, key)
                for key, resident in self._residents.items()
                if resident.level is level and key not in self._in_use and key not in self._expected
            ]
            if not movable:
                return
            value, key = min(movable)
            self._age = max(self._age, value)
            resident = self._residents[key]
            if level is Level.DEVICE and self._fits_into_host(resident):
                self._lower(resident)
                self.counts.moves_to_host += 1
            else:
                del resident
                self._forget([key])

    def _fits_into_host(self, resident: _Resident) -> bool:
        """Whether there is room for a model in host memory, once others have made way."""
        if resident.copies:
            return True
        if resident.size_bytes > self._budgets[Level.HOST]:
            return False
        self._make_room(Level.HOST, resident.size_bytes)
        return self.used_bytes(Level.HOST) + resident.size_bytes <= self._budgets[Level.HOST]

    def _dropped_copy(self) -> bool:
        """Let go of the host's copy of the least valuable model that is on the device; False if there is none."""
        spare = [
            resident for resident in self._residents.values() if resident.level is Level.DEVICE and resident.copies
        ]
        if not spare:
            return False
        min(spare, key=lambda resident: resident.value).copies.clear()
        return True

    def _lower(self, resident: _Resident) -> None:
        """Move a model to host memory."""
        if self._is_apart:
            for tensor in _tensors_of(resident.modules):
                if id(tensor) not in resident.copies:
                    resident.copies[id(tensor)] = host_copy(tensor.data)
                tensor.data = resident.copies[id(tensor)]
        resident.level = Level.HOST

    def _raise(self, resident: _Resident) -> None:
        """Move a model to the device, all of it or nothing."""
        if self._is_apart:
            try:
                for tensor in _tensors_of(resident.modules):
                    tensor.data = tensor.data.to(self.device, non_blocking=True)
            except BaseException:
                self._lower(resident)
                raise
        resident.level = Level.DEVICE

    def _release(self) -> None:
        """Give the device back what nobody holds any more; modules that refer to each other hold their memory."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def host_copy(tensor: Tensor) -> Tensor:
    """A copy in host memory: pinned, so that it comes back at the speed of the bus, where the system allows it."""
    try:
        copy = torch.empty_like(tensor, device="cpu", pin_memory=True)
        copy.copy_(tensor)
        return copy
    except (RuntimeError, NotImplementedError):
        return tensor.to("cpu", copy=True)


def modules_in(thing: Any) -> list[nn.Module]:
    """The modules in an object: itself, or those in its attributes and containers, as far as the objects are ours."""
    found: list[nn.Module] = []
    seen: set[int] = set()

    def look(value: Any) -> None:
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, nn.Module):
            found.append(value)
        elif isinstance(value, list | tuple):
            for item in value:
                look(item)
        elif isinstance(value, dict):
            for item in value.values():
                look(item)
        elif type(value).__module__.startswith(OURS):
            look(getattr(value, "__dict__", {}))

    look(thing)
    return found


def _tensors_of(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Parameters and buffers, each once."""
    found: dict[int, Tensor] = {}
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            found[id(tensor)] = tensor
    return list(found.values())


def _bytes_of(modules: Iterable[nn.Module]) -> int:
    return sum(tensor.nbytes for tensor in _tensors_of(modules))
