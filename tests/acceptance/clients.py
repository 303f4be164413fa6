"""Other releases of fal's Python packages, each in a folder of its own that only a child process sees."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.acceptance.live import ROOT

FOLDER = ROOT / "build" / "clients"
SITE = Path(__file__).with_name("site")
INSTALL_S = 600.0


def installed(requirement: str) -> Path:
    """The folder of a release, filled by pip at the first call; skips the test where pip cannot."""
    folder = FOLDER / requirement.replace("==", "-")
    if folder.exists():
        return folder
    FOLDER.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=FOLDER, prefix="draft-"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--retries", "1", "--disable-pip-version-check"]
    try:
        done = subprocess.run(
            [*pip, "--target", str(draft), requirement], capture_output=True, text=True, timeout=INSTALL_S
        )
    except subprocess.TimeoutExpired:
        shutil.rmtree(draft)
        pytest.skip(f"pip did not install {requirement} within {INSTALL_S:g} s")
    if done.returncode:
        shutil.rmtree(draft)
        pytest.skip(f"pip cannot install {requirement}: {done.stderr.strip().splitlines()[-1:]}")
    draft.chmod(0o755)
    draft.rename(folder)
    return folder


def confined(environment: dict[str, str], release: Path | None = None) -> dict[str, str]:
    """An environment for a process that uses a release (else the installed one) and cannot leave this machine."""
    return environment | {"PYTHONPATH": os.pathsep.join(map(str, filter(None, (SITE, release))))}
