"""Pickles into safetensors, in a process that is thrown away.

Reading a pickle can run code. torch's own reader for untrusted files allows a short list of types only, but has had
holes; so it runs where there is nothing to steal: no environment, no secrets, no standard input, limits on memory, time
and files, no network where the system lets an unprivileged process give it up. Only the safetensors that come out are
ever loaded by the server.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from weights.header import UnsuitableFile

TIMEOUT_S = 600
POLL_S = 0.5
MAX_MEMORY_BYTES = 48 * 2**30
"""Of address space; torch alone reserves several GB of it."""
MAX_OPEN_FILES = 256
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000

_PROGRAM = """
import sys
sys.path[:0] = sys.argv[3:]
from weights.unpickle import _convert_here
_convert_here(sys.argv[1], sys.argv[2])
"""


def convert(source: Path, target: Path, poll: Callable[[], None] = lambda: None) -> None:
    """Turn a pickle of tensors into a safetensors file, in another process.

    `poll` is called every `POLL_S` seconds; if it raises, the other process is ended.

    Raises:
        UnsuitableFile: It holds anything else, or takes more time or memory than allowed.
    """
    package = str(Path(__file__).resolve().parent.parent)
    command = [sys.executable, "-I", "-c", _PROGRAM, str(source.resolve()), str(target.resolve()), package]
    deadline = time.monotonic() + TIMEOUT_S
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd="/",
    )
    try:
        while process.poll() is None:
            poll()
            if time.monotonic() > deadline:
                raise UnsuitableFile(f"is a pickle that could not be read within {TIMEOUT_S} s")
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(POLL_S)
    finally:
        process.kill()
        process.wait()
    if process.returncode != 0 or not target.is_file():
        raise UnsuitableFile("is a pickle that holds more than tensors, or cannot be read")


def _convert_here(source: str, target: str) -> None:
    """What the other process does."""
    # A user namespace of its own needs a process with one thread: before torch is there.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).unshare(CLONE_NEWUSER | CLONE_NEWNET)
    import torch
    from safetensors.torch import save_file

    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (TIMEOUT_S, TIMEOUT_S))
    resource.setrlimit(resource.RLIMIT_NOFILE, (MAX_OPEN_FILES, MAX_OPEN_FILES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    size = 4 * os.path.getsize(source) + 2**20
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    content = torch.load(source, map_location="cpu", weights_only=True)
    found = _tensors(content)
    if not found:
        raise SystemExit("no tensors")
    # A few bytes can stand for a tensor of any size; only views that repeat themselves are larger than the file.
    if sum(tensor.numel() * tensor.element_size() for tensor in found.values()) > size:
        raise SystemExit("tensors larger than their file")
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in found.items()}, target)


def _tensors(content: object) -> dict[str, Any]:
    """The tensors of a checkpoint, a LoRA or an embedding, as they are called in safetensors."""
    import torch

    if not isinstance(content, dict):
        raise SystemExit("not a table")
    vectors = content.get("string_to_param")
    if isinstance(vectors, dict) and len(vectors) == 1:  # an A1111 embedding
        return {"emb_params": next(iter(vectors.values()))}
    inner = content.get("state_dict")
    table = inner if isinstance(inner, dict) else content
    return {str(name): value for name, value in table.items() if isinstance(value, torch.Tensor)}
