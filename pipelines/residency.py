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
                started = time.perf_counter()
                thing = load()
                modules = modules_in(thing)
                resident = _Resident(thing, modules, _bytes_of(modules), time.perf_counter() - started)
                self._residents[key] = resident
                self.counts.loads += 1
                self.counts.load_s += resident.load_s
            elif resident.level is Level.HOST:
                self._make_room(Level.DEVICE, resident.size_bytes)
                self._raise(resident)
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
        gc.collect()  # modules that refer to each other hold their memory until then
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def level_of(self, key: str) -> Level | None:
        """Where a model is; None when it is on disk only."""
        resident = self._residents.get(key)
        return None if resident is None else resident.level

    def used_bytes(self, level: Level) -> int:
        """Bytes of the models on a level."""
        return sum(resident.size_bytes for resident in self._residents.values() if resident.level is level)

    def _make_room(self, level: Level, size_bytes: int) -> None:
        """Move models down until so many bytes are free on a level, or only what is needed is left there."""
        while self.used_bytes(level) + size_bytes > self._budgets[level]:
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
            if level is Level.DEVICE and resident.size_bytes <= self._budgets[Level.HOST]:
                self._make_room(Level.HOST, resident.size_bytes)
                self._lower(resident)
                self.counts.moves_to_host += 1
            else:
                del self._residents[key]
                del resident
                self.counts.moves_to_disk += 1
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()

    def _lower(self, resident: _Resident) -> None:
        """Move a model to host memory; its copy there is pinned, so that it comes back at the speed of the bus."""
        resident.level = Level.HOST
        if self.device.type == "cpu":
            return
        for tensor in _tensors_of(resident.modules):
            copy = resident.copies.get(id(tensor))
            if copy is None:
                copy = torch.empty_like(tensor.data, device="cpu", pin_memory=True)
                copy.copy_(tensor.data)
                resident.copies[id(tensor)] = copy
            tensor.data = copy

    def _raise(self, resident: _Resident) -> None:
        """Move a model to the device; where that fails half-way, the next request tries again."""
        if self.device.type != "cpu":
            for tensor in _tensors_of(resident.modules):
                tensor.data = tensor.data.to(self.device, non_blocking=True)
        resident.level = Level.DEVICE


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
