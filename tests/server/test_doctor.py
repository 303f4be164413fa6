"""What `creative-upscaler doctor` says of the networks that an operator brings."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from server.doctor import network_rows
from weights.store import WeightStore


@pytest.fixture
def store(tmp_path: Path) -> WeightStore:
    (tmp_path / "upscaler").mkdir()
    return WeightStore("full", tmp_path)


def test_nothing_is_said_of_folders_that_are_not_there(tmp_path: Path) -> None:
    """A set without the operator's own networks is complete."""
    assert list(network_rows(WeightStore("full", tmp_path), "face-restorer")) == []


def test_files_that_may_be_networks_are_named(store: WeightStore) -> None:
    """Safetensors and pickles, without a complaint."""
    (store.root / "face-restorer").mkdir()
    save_file({"a": np.zeros(3)}, store.folder("upscaler") / "net.safetensors")
    (store.folder("face-restorer") / "old.pth").write_bytes(pickle.dumps({"a": 1}))

    rows = [row for part in ("upscaler", "face-restorer") for row in network_rows(store, part)]

    assert [row.split() for row in rows] == [["upscaler:", "net.safetensors"], ["face-restorer:", "old.pth"]]


@pytest.mark.parametrize("name", ["net.safetensors", "net.pth"])
@pytest.mark.parametrize("content", [b"", b"<!doctype html><p>Sign in</p>", b"\xff" * 100])
def test_files_that_cannot_be_networks_are_told(store: WeightStore, name: str, content: bytes) -> None:
    """An empty file, a saved login page, noise."""
    (store.folder("upscaler") / name).write_bytes(content)

    (row,) = network_rows(store, "upscaler")

    assert name in row and "cannot be used" in row


def test_two_networks_are_one_too_many(store: WeightStore) -> None:
    """Both are named, because only the operator knows which he meant."""
    for name in ("a.safetensors", "b.pth"):
        (store.folder("upscaler") / name).touch()

    assert [("one of several" in row) for row in network_rows(store, "upscaler")] == [True, True]
