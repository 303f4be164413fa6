"""Programs that come from Debian's packages: installed where that is ours to do."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.acceptance.live import ROOT

INSTALL_S = 600.0


def installed(program: Path, package: str) -> Path:
    """The program, from apt where it is missing; skips the test where apt is not there or not for us."""
    lock_path = ROOT / "build" / "apt.lock"
    lock_path.parent.mkdir(exist_ok=True)
    with lock_path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other test processes may want it too
        if not program.exists():
            install(program, package)
    return program


def install(program: Path, package: str) -> None:
    """Have apt install a package."""
    if os.getuid() != 0 or shutil.which("apt-get") is None:
        pytest.skip(f"needs {program}; {package} is installed here only as root on a system with apt")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "-y", "--no-install-recommends", package]):
        done = subprocess.run(
            ["apt-get", "-qq", *command], env=environment, capture_output=True, text=True, timeout=INSTALL_S
        )
        if done.returncode != 0:
            pytest.skip(f"apt-get {command[0]} failed: {done.stderr[-500:]}")
