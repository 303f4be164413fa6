"""Files from strangers are judged by their header and size before anything in them is read."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from weights.header import UnsuitableFile, read_header


def write(path: Path, header: Any, data: bytes = b"", *, announced: int | None = None) -> Path:
    """A file of this header and these bytes; `announced` is what it says of the header's length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if announced is None else announced).to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, end: int, *, shape: Any = None, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def test_a_file_of_the_library_is_read(tmp_path: Path) -> None:
    """What safetensors writes is accepted, with shapes, kinds and texts."""
    path = tmp_path / "good.safetensors"
    save_file({"a": torch.zeros(2, 3), "b": torch.ones(4).half()}, path, metadata={"made by": "us"})

    header = read_header(path)

    assert {name: (info.dtype, info.shape) for name, info in header.tensors.items()} == {
        "a": ("F32", (2, 3)),
        "b": ("F16", (4,)),
    }
    assert header.metadata == {"made by": "us"}


@pytest.mark.parametrize("length", [0x280, 0x580, 0x10380])
def test_a_length_that_looks_like_a_pickle_is_no_pickle(tmp_path: Path, length: int) -> None:
    """One header in 2048 has a length whose bytes are those that a pickle begins with."""
    header = json.dumps({"a": entry(0, 4)}).encode().ljust(length)

    assert read_header(write(tmp_path / "x", header, b"1234")).tensors.keys() == {"a"}


@pytest.mark.parametrize(
    ("header", "data", "reason"),
    [
        ({"a": entry(0, 8)}, b"1234", "cut off"),
        ({"a": entry(0, 4)}, b"12345678", "4 bytes more"),
        ({"a": entry(0, 4), "b": entry(2, 6)}, b"123456", "overlap"),
        ({"a": entry(0, 4), "b": entry(8, 12)}, b"0" * 12, "gaps"),
        ({"a": entry(0, 4, shape=[10**10])}, b"1234", "lies"),
        ({"a": entry(0, 10 * 2**30)}, b"1234", "cut off"),
        ({"a": entry(8, 4, shape=[1])}, b"1234", "lies"),
        ({"a": entry(-4, 0, shape=[1])}, b"", "no known form"),
        ({"a": entry(0, 4, shape=[True])}, b"1234", "no known form"),
        ({"a": entry(0, 4, shape=[-1])}, b"1234", "no known form"),
        ({"a": entry(0, 4, shape=[1] * 9)}, b"1234", "no known form"),
        ({"a": entry(0, 4, dtype="C64")}, b"1234", "kind 'C64'"),
        ({"a": [1, 2]}, b"", "no known form"),
        ({"__metadata__": {"x": 1}, "a": entry(0, 4)}, b"1234", "metadata"),
        ({}, b"", "no tensors"),
        (b'{"a": 1, "a": 2}', b"", "JSON"),
        (b'{"a": ' + b"[" * 100_000, b"", "JSON"),
        (b"{" + b"\xff" * 20, b"", "JSON"),
        ({"a": entry(0, 4, shape=[10**1000] * 8)}, b"1234", "no known form"),
        ({"a": entry(0, 0, shape=[0, 2**64])}, b"", "no known form"),
        (json.dumps({"a\ud800": entry(0, 4)}).encode(), b"1234", "JSON"),
        (json.dumps({"a": entry(0, 4)}).encode("utf-16-le"), b"1234", "JSON"),
        (
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":' + b"[" * 300 + b"]" * 300 + b"}}",
            b"1234",
            "JSON",
        ),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: Any, data: bytes, reason: str) -> None:
    """Sizes and places are compared with each other and with the file that is there."""
    with pytest.raises(UnsuitableFile, match=reason):
        read_header(write(tmp_path / "x", header, data))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "0 bytes"),
        (b"1234567", "7 bytes"),
        (b"  <!DOCTYPE html><html></html>", "web page"),
        (b"<html><body>Log in</body></html>", "web page"),
        (pickle.dumps({"a": 1}, protocol=2), "pickle"),
        (b"PK\x03\x04" + b"0" * 40, "pickle"),
        (b"version https://git-lfs.github.com/spec/v1\n", "LFS"),
        ((10 * 2**30).to_bytes(8, "little") + b"{}" + b" " * 20, "not a safetensors file"),
        ((2**20).to_bytes(8, "little") + b"{}" + b" " * 20, "cut off"),
        (b"\x89PNG\r\n\x1a\n" + b"0" * 40, "not a safetensors file"),
    ],
)
def test_what_is_no_safetensors_file_is_named(tmp_path: Path, content: bytes, reason: str) -> None:
    """Web pages, pickles, pointers and stumps are refused in words that help, and nothing in them is run."""
    path = tmp_path / "x"
    path.write_bytes(content)

    with pytest.raises(UnsuitableFile, match=reason):
        read_header(path)


def test_every_cut_of_a_real_file_is_refused(tmp_path: Path) -> None:
    """A download that broke off anywhere is noticed."""
    path = tmp_path / "whole"
    save_file({"a": torch.zeros(3), "b": torch.ones(2)}, path)
    whole = path.read_bytes()
    cut = tmp_path / "cut"

    for length in range(len(whole)):
        cut.write_bytes(whole[:length])
        with pytest.raises(UnsuitableFile):
            read_header(cut)
