"""What this machine has and what is missing: the lines of `creative-upscaler doctor`. Loads no torch."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path

from server.settings import Settings
from server.supervisor import detect_gpus, read_server
from weights.catalogue import ENDPOINT_PARTS, needs_of
from weights.header import SNIFF_BYTES, UnsuitableFile, is_pickle, read_header
from weights.store import POCKET_FOLDER, WeightStore, pull_command

LOW_DISK_BYTES = 2_000_000_000
SINGLE_NETWORKS = ("upscaler", "face-restorer")
"""Parts of which an operator may bring a file of his own choice."""
NETWORK_SUFFIXES = (".safetensors", ".pth", ".ckpt")


def examine(settings: Settings) -> Iterator[str]:
    """One line per finding, `name  what was found  (advice)`."""
    gpus = detect_gpus()
    torch = version_of("torch")
    free_bytes = free_disk_bytes(settings.data)
    running = read_server(settings)
    yield _row("python", platform.python_version())
    yield _row("processor", f"{os.cpu_count()} cores, {memory_bytes() / 1e9:.0f} GB memory")
    yield _row("GPU", ", ".join(describe_gpus(gpus)) or "none; pictures are made on the processor")
    yield _row("torch", torch, torch_advice(torch, bool(gpus)))
    yield _row("fal-client", version_of("fal-client"))
    disk_advice = "less than 2 GB are free" if free_bytes < LOW_DISK_BYTES else ""
    yield _row("data folder", f"{settings.data}, {free_bytes / 1e9:.0f} GB free", disk_advice)
    yield _row("server", f"runs as process {running['pid']}" if running else "does not run")
    for name, folder in (("pocket", POCKET_FOLDER), ("full", settings.full_weights_dir)):
        yield from weights_rows(WeightStore(name, folder), settings.full_flux_profile)


def weights_rows(store: WeightStore, flux_profile: str) -> Iterator[str]:
    """Which endpoints a set of weights is enough for, the files that are not there, and how to get them."""
    missing = {endpoint: store.missing(endpoint, flux_profile) for endpoint in ENDPOINT_PARTS}
    ready = [endpoint for endpoint, files in missing.items() if not files]
    found = "complete" if len(ready) == len(missing) else f"enough for {', '.join(ready) or 'no endpoint'}"
    yield _row(f"{store.name} weights", found, str(store.root))
    for file in dict.fromkeys(file for files in missing.values() for file in files):
        yield _row("", f"missing: {file}")
    for endpoint in (each for each, files in missing.items() if files and store.name == "full"):
        yield _row("", f"To get them for {endpoint}: {pull_command(endpoint)}")
    optional = dict.fromkeys(name for each in ENDPOINT_PARTS for name in needs_of(each, flux_profile).optional)
    if store.name == "full" and (absent := [name for name in optional if not store.has(name)]):
        yield _row("", f"done without: {', '.join(absent)} (see `creative-upscaler weights list`)")
    for part in SINGLE_NETWORKS:
        yield from network_rows(store, part)


def network_rows(store: WeightStore, part: str) -> Iterator[str]:
    """What the operator put into a folder that holds the file of one network, and what is wrong with it."""
    files = sorted(file for file in store.folder(part).glob("*") if file.suffix in NETWORK_SUFFIXES)
    for file in files:
        yield _row("", f"{part}: {file.name}", "one of several; leave one" if len(files) > 1 else fault_of(file))


def fault_of(file: Path) -> str:
    """Why a file cannot hold a network, as far as its first bytes tell; nothing if it may."""
    try:
        if file.suffix == ".safetensors":
            read_header(file)
        elif not zipfile.is_zipfile(file):
            with file.open("rb") as stream:
                return (
                    "" if is_pickle(stream.read(SNIFF_BYTES)) else "cannot be used: it is no file that torch has saved"
                )
    except (UnsuitableFile, OSError) as error:
        return f"cannot be used: the file {error}"
    return ""


def describe_gpus(gpus: list[str]) -> list[str]:
    """The GPUs with name and memory as their driver tells; only their numbers without a driver's tool."""
    query = ["nvidia-smi", "--query-gpu=index,name,memory.total", "--format=csv,noheader"]
    try:
        listing = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return [f"GPU {name}" for name in gpus]
    return [line.strip() for line in listing.splitlines() if line.split(",")[0].strip() in gpus]


def torch_advice(version: str, has_gpu: bool) -> str:
    """What to do when torch cannot use the GPU that is there."""
    if has_gpu and version.endswith("+cpu"):
        return "built without CUDA: install the CUDA build to use the GPU, or set CUDA_VISIBLE_DEVICES= to do without"
    return ""


def version_of(package: str) -> str:
    """The version of a package, or that it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def memory_bytes() -> int:
    """The machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_disk_bytes(folder: Path) -> int:
    """Free bytes where a folder is or would be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _row(name: str, found: str, note: str = "") -> str:
    return f"{name:<16}{found}" + (f"  ({note})" if note else "")
