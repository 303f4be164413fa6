"""Models move between device, host memory and disk by what they are worth."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from pipelines.residency import Level, Residency, modules_in

KB = 1024


class Disk:
    """Loads models of so many KB and counts how often each was read."""

    def __init__(self) -> None:
        self.reads: dict[str, int] = {}

    def load(self, key: str, size_kb: int) -> nn.Module:
        self.reads[key] = self.reads.get(key, 0) + 1
        module = nn.Module()
        module.register_buffer("numbers", torch.arange(size_kb * KB // 4, dtype=torch.float32))
        return module


@pytest.fixture
def disk() -> Disk:
    return Disk()


def use(residency: Residency, disk: Disk, *keys: str, kind: str = "x", size_kb: int = 10) -> list[nn.Module]:
    """One request that needs these models."""
    with residency.request(kind):
        return [
            residency.get(key, lambda key=key: disk.load(key, size_kb), size_bytes=size_kb * KB)  # type: ignore[misc]
            for key in keys
        ]


def small(device_kb: int, host_kb: int) -> Residency:
    return Residency(torch.device("cpu"), device_bytes=device_kb * KB, host_bytes=host_kb * KB)


def test_a_model_that_was_displaced_comes_back_without_the_disk(disk: Disk) -> None:
    """Two models that take turns on a device for one are read from disk once each."""
    residency = small(15, 100)
    (first,) = use(residency, disk, "a")

    for _ in range(3):
        use(residency, disk, "b")
        assert residency.level_of("a") is Level.HOST
        assert use(residency, disk, "a") == [first]

    assert disk.reads == {"a": 1, "b": 1}
    assert residency.used_bytes(Level.DEVICE) <= 15 * KB


def test_without_host_memory_a_model_is_read_again(disk: Disk) -> None:
    """What fits nowhere is let go, and loaded when it is wanted."""
    residency = small(15, 5)

    for key in ("a", "b", "a"):
        use(residency, disk, key)

    assert disk.reads == {"a": 2, "b": 1}
    assert residency.level_of("b") is None


def test_the_least_valuable_goes_first(disk: Disk) -> None:
    """What is used often stays; what was used once is displaced."""
    residency = small(25, 0)
    for _ in range(5):
        use(residency, disk, "often")
    use(residency, disk, "once")
    residency._residents["often"].load_s = residency._residents["once"].load_s = 1.0
    for key in ("often", "once"):
        use(residency, disk, key)

    use(residency, disk, "new")

    assert residency.level_of("often") is Level.DEVICE and residency.level_of("once") is None


def test_what_runs_or_is_waited_for_stays(disk: Disk) -> None:
    """Models of the running request and of queued ones are not displaced, even beyond the budget."""
    residency = small(15, 100)
    use(residency, disk, "queued", kind="queued")
    residency.expect(["queued", "never seen"])

    use(residency, disk, "b", "c", kind="running")

    assert [residency.level_of(key) for key in ("queued", "b", "c")] == [Level.DEVICE] * 3
    residency.expect([])
    use(residency, disk, "b")
    assert residency.used_bytes(Level.DEVICE) <= 15 * KB


def test_a_load_that_fails_leaves_nothing(disk: Disk) -> None:
    """The next request loads it again."""
    residency = small(15, 15)

    def broken() -> nn.Module:
        raise OSError("unreadable")

    with residency.request("x"), pytest.raises(OSError):
        residency.get("a", broken)

    use(residency, disk, "a")
    assert disk.reads == {"a": 1}


def test_a_move_that_fails_half_way_is_made_again(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that found no room on the device is not taken for one that is there."""
    residency = small(15, 100)
    use(residency, disk, "a")
    use(residency, disk, "b")

    def full(modules: Any) -> Any:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as broken:
        broken.setattr(residency, "device", torch.device("meta"))
        broken.setattr("pipelines.residency._tensors_of", full)
        with pytest.raises(RuntimeError):
            use(residency, disk, "a")

    assert residency.level_of("a") is Level.HOST
    use(residency, disk, "a")
    assert residency.level_of("a") is Level.DEVICE and disk.reads["a"] == 1


def test_modules_are_found_where_pipelines_keep_them() -> None:
    """In attributes of our own objects and in containers, each once."""

    class Pipeline:
        def __init__(self) -> None:
            self.one: Any = nn.Linear(1, 1)
            self.more = {"list": [self.one, nn.Linear(2, 2)], "name": "text"}
            self.itself = self

    pipeline = Pipeline()

    assert modules_in(pipeline) == [pipeline.one, pipeline.more["list"][1]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_weights_are_the_same_after_the_way_there_and_back() -> None:
    """Device to pinned memory and back changes no bit, nor the layout in memory."""
    residency = Residency(torch.device("cuda"), device_bytes=10 * KB, host_bytes=10**9)
    model = nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    for _ in range(3):
        with residency.request("a"):
            on_device = residency.get("a", lambda: copy.deepcopy(model).cuda())
        with residency.request("b"):
            residency.get("b", lambda: nn.Linear(64, 64).cuda())
        assert residency.level_of("a") is Level.HOST
        assert on_device.weight.is_pinned() and on_device.weight.is_contiguous(memory_format=torch.channels_last)

    assert all(torch.equal(tensor.cpu(), before[name]) for name, tensor in on_device.state_dict().items())
