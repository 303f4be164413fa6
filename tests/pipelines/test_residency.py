"""Models move between device, host memory and disk by what they are worth."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from pipelines.creative_upscaler import CreativeUpscaler, Params
from pipelines.models import Models
from pipelines.residency import Level, Residency, host_copy, modules_in
from tests.conftest import png_bytes
from tests.pipelines.test_creative_upscaler import DEFAULTS, UNLIMITED
from weights.store import WeightStore

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


def apart(device_kb: int, host_kb: int) -> Residency:
    """As on a GPU: host memory holds copies. The device is this machine's own memory, all else is the real thing."""
    residency = small(device_kb, host_kb)
    residency._is_apart = True
    return residency


def test_a_move_that_fails_half_way_is_undone_and_made_again(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that found no room on the device holds nothing there, and is not taken for one that is there."""
    residency = apart(25, 100)

    def two(key: str) -> nn.Module:
        module = disk.load(key, 10)
        module.register_buffer("more", torch.ones(10))
        return module

    with residency.request("x"):
        model = residency.get("a", lambda: two("a"))
    use(residency, disk, "b", size_kb=20)
    assert residency.level_of("a") is Level.HOST
    copies = {id(copy) for copy in residency._residents["a"].copies.values()}
    moves = iter([model.numbers.clone()])
    real = torch.Tensor.to

    def full(tensor: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        if options.get("non_blocking"):
            for moved in moves:
                return moved
            raise RuntimeError("CUDA error: out of memory")
        return real(tensor, *args, **options)

    with monkeypatch.context() as broken:
        broken.setattr(torch.Tensor, "to", full)
        with residency.request("x"), pytest.raises(RuntimeError):
            residency.get("a", lambda: pytest.fail("is in host memory"))

    assert residency.level_of("a") is Level.HOST
    assert {model.numbers.data_ptr(), model.more.data_ptr()} == {
        copy.data_ptr() for copy in residency._residents["a"].copies.values() if id(copy) in copies
    }
    use(residency, disk, "a")
    assert residency.level_of("a") is Level.DEVICE and disk.reads["a"] == 1


def test_copies_in_host_memory_count_there(disk: Disk) -> None:
    """A copy stays good when its model is on the device, but goes before it takes the room of another."""
    residency = apart(15, 15)
    (first,) = use(residency, disk, "a")
    before = first.numbers.clone()

    use(residency, disk, "b")
    use(residency, disk, "a")

    assert residency.used_bytes(Level.HOST) <= 15 * KB
    assert residency.level_of("b") in (Level.HOST, None)
    assert torch.equal(first.numbers, before)
    for _ in range(3):
        use(residency, disk, "b")
        use(residency, disk, "a")
        assert residency.used_bytes(Level.HOST) <= 15 * KB and residency.used_bytes(Level.DEVICE) <= 15 * KB


def test_host_memory_is_never_exceeded_for_what_is_waited_for(disk: Disk) -> None:
    """Where the host's models must stay, the next one from the device goes to disk."""
    residency = small(15, 12)
    use(residency, disk, "queued", kind="queued")
    use(residency, disk, "b")
    assert residency.level_of("queued") is Level.HOST
    residency.expect(["queued"])

    use(residency, disk, "c")

    assert residency.level_of("queued") is Level.HOST and residency.level_of("b") is None
    assert residency.used_bytes(Level.HOST) <= 12 * KB


def test_memory_that_cannot_be_pinned_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Systems limit how much memory is pinned; a plain copy comes back more slowly."""
    if torch.cuda.is_available():
        monkeypatch.setattr(torch, "empty_like", lambda *_, **__: pytest.raises(RuntimeError))
    tensor = torch.randn(2, 8, 3, 3).to(memory_format=torch.channels_last)

    copied = host_copy(tensor)

    assert torch.equal(copied, tensor) and copied.data_ptr() != tensor.data_ptr() and not copied.is_pinned()
    assert copied.is_contiguous(memory_format=torch.channels_last)


def test_a_load_without_room_is_made_again_when_all_else_has_gone(disk: Disk) -> None:
    """Budgets are estimates: what runs out of memory gets all that may go, once, but nothing that is waited for."""
    residency = small(100, 100)
    use(residency, disk, "queued", kind="queued")
    use(residency, disk, "other")
    residency.expect(["queued"])
    tries: list[int] = []

    def load() -> nn.Module:
        tries.append(residency.used_bytes(Level.DEVICE))
        if len(tries) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return disk.load("large", 10)

    with residency.request("x"):
        residency.get("large", load)

    assert tries == [20 * KB, 10 * KB]
    assert (residency.level_of("queued"), residency.level_of("other")) == (Level.DEVICE, Level.HOST)

    def never() -> nn.Module:
        tries.append(0)
        raise torch.OutOfMemoryError("CUDA out of memory")

    with residency.request("x"), pytest.raises(torch.OutOfMemoryError):
        residency.get("huge", never)
    assert len(tries) == 4 and residency.level_of("huge") is None


def test_a_displaced_family_comes_back_without_its_files(
    pocket: WeightStore, tmp_path: Path, photo_crop: Image.Image
) -> None:
    """With nothing left in its files, what waited in host memory makes the same picture as before."""
    root = tmp_path / "weights"
    for part in ("vae", "sd15", "controlnet-tile-sd15", "sdxl", "controlnet-tile-sdxl", "upscaler-compact-x2"):
        shutil.copytree(pocket.folder(part), root / part)
    residency = Residency(torch.device("cpu"), device_bytes=1, host_bytes=10**9)
    residency._is_apart = True
    models = Models(replace(pocket, root=root), torch.device("cpu"), residency)
    params = Params(**(DEFAULTS | {"num_inference_steps": 1, "scale": 1.0}))
    pipeline, image = CreativeUpscaler(models, weights={}), png_bytes(photo_crop.crop((0, 0, 48, 48)))

    def made(family: str) -> bytes:
        output = BytesIO()
        with models.request(family):
            wanted = replace(params, family=family)
            pipeline(image, wanted, limits=UNLIMITED, output=output, progress=lambda report: None)
        return output.getvalue()

    first = made("SD_1_5")
    made("SDXL")
    assert residency.level_of("SD_1_5") is Level.HOST
    for file in [path for path in root.rglob("*") if path.is_file()]:
        file.unlink()  # not emptied in place: on a CPU weights may be pages of their file
        file.touch()

    assert made("SD_1_5") == first
    assert residency.counts.returns > 0


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


def test_what_one_kind_of_requests_alone_used_is_dropped(disk: Disk) -> None:
    """What is shared stays until the last kind that used it is dropped; all is told, with who used it."""
    residency = small(100, 100)
    use(residency, disk, "a", "shared", kind="first x")
    use(residency, disk, "b", "shared", kind="second")
    before = {holding.key: (holding.users, holding.size_bytes) for holding in residency.holdings()}

    dropped = [residency.drop(lambda kind, name=name: kind.startswith(name)) for name in ("first", "first", "second")]  # type: ignore[misc]

    assert before["shared"] == (("first x", "second"), 10 * KB) and before["a"] == (("first x",), 10 * KB)
    assert [sorted(keys) for keys in dropped] == [["a"], [], ["b", "shared"]]
    assert residency.holdings() == [] and residency.used_bytes(Level.DEVICE) == 0
    assert (residency.counts.loads, residency.counts.moves_to_disk) == (3, 3)


def test_everything_is_dropped_and_comes_back(disk: Disk) -> None:
    """After that nothing is held, wherever it was, and the next request loads what it wants."""
    residency = small(15, 100)
    use(residency, disk, "a")
    use(residency, disk, "b")
    moved = residency.counts.moves_to_host

    dropped = residency.drop_all()
    use(residency, disk, "a")

    assert sorted(dropped) == ["a", "b"] and moved == 1
    assert [holding.key for holding in residency.holdings()] == ["a"] and disk.reads == {"a": 2, "b": 1}
