"""nginx in front of a server, for as long as a test needs it."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2

from tests.acceptance.debian import installed

NGINX = Path("/usr/sbin/nginx")
START_S = 20.0
AROUND = """
daemon off;
user {user};
pid {folder}/nginx.pid;
error_log stderr;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    {server}
}}
"""


@contextmanager
def serving(server: str, folder: Path, port: int) -> Iterator[None]:
    """nginx with one `server` block that listens on this port, with nothing outside of the folder."""
    program = installed(NGINX, "nginx-light")
    config = folder / "nginx.conf"
    config.write_text(AROUND.format(folder=folder, server=server, user=folder.owner()))
    with subprocess.Popen(
        [program, "-p", folder, "-c", config, "-e", "stderr"], stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            wait_until_open(process, port)
            yield
        finally:
            process.terminate()


def wait_until_open(process: subprocess.Popen[str], port: int) -> None:
    """Wait until it answers."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert process.poll() is None and process.stderr is not None, process.communicate()[1]
        try:
            httpx2.get(f"https://localhost:{port}/health", verify=False, trust_env=False)
            return
        except httpx2.TransportError:
            time.sleep(0.05)
    raise AssertionError("nginx does not answer")
