"""`make demo`: a server for a minute, one photograph sent through fal's own client, and the picture on disk.

The client is a process of its own and knows nothing but what `creative-upscaler env` prints: what works here works for
any program that uses fal-client.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import typer
from PIL import Image

PHOTO = Path(__file__).parents[1] / "weights" / "pocket" / "photos" / "worker.png"
PROMPT = "a photograph of a worker inside the fuselage of an aircraft"
LONG_SIDE_PX = 512
OUTPUT = Path("demo")
START_S = 120.0
STOP_S = 20.0

CLIENT = """
import json, sys, urllib.request
import fal_client

def show(update):
    if isinstance(update, (fal_client.InProgress, fal_client.Completed)):
        for line in update.logs[show.seen:]:
            sys.stdout.write("    " + line["message"] + "\\n")
        show.seen = len(update.logs)
        sys.stdout.flush()

show.seen = 0
image, prompt, output = sys.argv[1:]
result = fal_client.subscribe(
    "fal-ai/creative-upscaler",
    arguments={"image_url": fal_client.encode_file(image), "prompt": prompt, "seed": 42},
    with_logs=True,
    on_queue_update=show,
)
with urllib.request.urlopen(result["image"]["url"]) as picture, open(output, "wb") as file:
    file.write(picture.read())
sys.stdout.write(json.dumps(result) + "\\n")
"""


class DemoFailed(Exception):
    """A part of the demonstration did not work; the message says which."""


def main() -> None:
    """Run the demonstration; the last line printed is the path of the picture."""
    try:
        typer.echo(demonstrate())
    except DemoFailed as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)


def demonstrate() -> Path:
    """Start a server, send the photograph, save input, Lanczos enlargement and result; returns the result's path."""
    if importlib.util.find_spec("fal_client") is None:
        raise DemoFailed("the demonstration speaks through fal's client; install it with `pip install fal-client`")
    OUTPUT.mkdir(exist_ok=True)
    source, lanczos, result = (OUTPUT / f"{PHOTO.stem}-{what}.png" for what in ("input", "lanczos", "upscaled"))
    prepare(source, lanczos)
    with tempfile.TemporaryDirectory(prefix="upscaler-demo-") as folder, running_server(Path(folder)) as environment:
        typer.echo(f"sending {source} through fal_client.subscribe")
        started = time.monotonic()
        client = [sys.executable, "-c", CLIENT, str(source), PROMPT, str(result)]
        if subprocess.run(client, env=os.environ | environment, check=False).returncode:
            raise DemoFailed("the client failed; its message is above")
        typer.echo(f"took {time.monotonic() - started:.1f} s; beside it: {source.name}, {lanczos.name}")
    return result


def prepare(source: Path, lanczos: Path) -> None:
    """Save the photograph reduced to 512 px, and what plain enlargement makes of that."""
    with Image.open(PHOTO) as photo:
        small = photo.convert("RGB")
    small.thumbnail((LONG_SIDE_PX, LONG_SIDE_PX), Image.Resampling.LANCZOS)
    small.save(source)
    small.resize((small.width * 2, small.height * 2), Image.Resampling.LANCZOS).save(lanczos)


@contextmanager
def running_server(data: Path) -> Iterator[dict[str, str]]:
    """A server with the pocket weights on free ports of this machine; yields the environment for clients."""
    port, tls_port = free_ports(2)
    program = [sys.executable, "-m", "server"]
    options = ["--data", str(data), "--port", str(port), "--tls-port", str(tls_port), "--weights", "pocket"]
    log_path = OUTPUT / "server.log"
    with log_path.open("wb") as log:
        server = subprocess.Popen([*program, "serve", *options], stdout=log, stderr=log)
    try:
        typer.echo(f"starting a server on https://localhost:{tls_port} (log: {log_path})")
        wait_until_ready(server, f"http://127.0.0.1:{port}/ready", log_path)
        command = [*program, "env", "--data", str(data)]
        yield exports(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(STOP_S)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def wait_until_ready(server: subprocess.Popen[Any], url: str, log_path: Path) -> None:
    """Wait until a slot can take a request."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise DemoFailed(f"the server ended with status {server.returncode}:\n{log_path.read_text()[-2000:]}")
        try:
            if httpx2.get(url, trust_env=False).status_code == 200:
                return
        except httpx2.TransportError:
            pass
        time.sleep(0.2)
    raise DemoFailed(f"the server was not ready after {START_S:g} s; see {log_path}")


def exports(text: str) -> dict[str, str]:
    """The variables in lines of the form `export NAME=value`."""
    words = [word for line in text.splitlines() for word in shlex.split(line) if word != "export"]
    return dict(word.split("=", 1) for word in words)


def free_ports(count: int) -> list[int]:
    """Ports of this machine on which nothing listens at the moment."""
    sockets = [socket.socket() for _ in range(count)]
    for opened in sockets:
        opened.bind(("127.0.0.1", 0))
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports


if __name__ == "__main__":
    main()
