"""The operator's commands: what a running server is at, and what it shall do; a client of `routes/operator`.

On the server's own machine they find its address and key in the data folder; `--url` and `UPSCALER_OPERATOR_KEY`
lead to another one.
"""

from __future__ import annotations

import os
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import httpx2
import typer

from server.auth import known_operator_key
from server.endpoints import ENDPOINTS
from server.errors import to_json
from server.settings import Settings
from server.supervisor import read_server

POLL_S = 0.2
ANSWER_S = 20.0

Data = Annotated[Path | None, typer.Option(help="Data folder of the server.", show_default=False)]
Url = Annotated[str | None, typer.Option(help="Address of a server elsewhere.", show_default=False, metavar="URL")]
Json = Annotated[bool, typer.Option("--json", help="As JSON.")]
Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it is done.")]
Subject = Annotated[str, typer.Argument(metavar="ENDPOINT|all", help=f"One of {', '.join(ENDPOINTS)}, or all.")]
Slot = Annotated[str, typer.Option(help="Only this slot.", show_default=False)]


class OperationFailed(Exception):
    """The server does not do what it was asked to; the message says why."""


def status(data: Data = None, url: Url = None, as_json: Json = False) -> None:
    """Show slots, what is loaded where, the queue with ages, and webhooks that are not delivered."""
    with reach(data, url) as server:
        found = server.ask("GET", "status")
    for line in [to_json(found).decode()] if as_json else describe(found):
        typer.echo(line)


def pause(data: Data = None, url: Url = None) -> None:
    """Start no more requests, but take them; what runs ends. Holds until `resume`, also over restarts."""
    with reach(data, url) as server:
        server.ask("POST", "pause")
    typer.echo("paused: requests are taken and wait; `creative-upscaler resume` starts them")


def resume(data: Data = None, url: Url = None) -> None:
    """Take and start requests again, after `pause` or `drain`."""
    with reach(data, url) as server:
        server.ask("POST", "resume")
    typer.echo("running")


def drain(data: Data = None, url: Url = None, wait: Wait = True) -> None:
    """Take no more requests, and wait until the last one is done. Holds until `resume`, also over restarts."""
    with reach(data, url) as server:
        server.ask("POST", "drain")
        typer.echo("draining: no requests are taken (503), /ready is 503")
        left = -1
        while wait and (now_left := sum(row["number"] for row in server.ask("GET", "status")["queue"])):
            if now_left != left:
                typer.echo(f"{now_left} requests left")
            left = now_left
            time.sleep(POLL_S)
    if wait:
        typer.echo("drained: stop the server, or `creative-upscaler resume`")


def preload(endpoint: Subject, slot: Slot = "", data: Data = None, url: Url = None, wait: Wait = True) -> None:
    """Load what an endpoint needs, so that its next request need not; slots do it after what they are at."""
    give("preload", endpoint, slot, data, url, wait)


def unload(endpoint: Subject, slot: Slot = "", data: Data = None, url: Url = None, wait: Wait = True) -> None:
    """Free the memory of models that an endpoint alone has used, or of all; they are loaded again when wanted."""
    give("unload", endpoint, slot, data, url, wait)


COMMANDS: tuple[Callable[..., None], ...] = (status, pause, resume, drain, preload, unload)


def give(action: str, endpoint: str, slot: str, data: Path | None, url: str | None, wait: bool) -> None:
    """Give an order, and say what each slot answered."""
    with reach(data, url) as server:
        order = server.ask("POST", action, {"endpoint": endpoint, "slot": slot})
        while wait and not order["is_done"]:
            time.sleep(POLL_S)
            order = server.ask("GET", f"orders/{order['id']}")
    if not wait:
        typer.echo(f"order {order['id']} is given")
    for slot_id, answer in order["answers"].items():
        typer.echo(f"slot {slot_id}: {answer}")
    if any(answer.startswith("failed") for answer in order["answers"].values()):
        raise OperationFailed(f"{action} {endpoint} did not succeed on every slot.")


class Reached:
    """A server whose operator we are."""

    def __init__(self, client: httpx2.Client, base: str) -> None:
        self._client, self._base = client, base

    def ask(self, method: str, path: str, wish: dict[str, Any] | None = None) -> dict[str, Any]:
        """The JSON answer; raises OperationFailed."""
        try:
            answer = self._client.request(method, f"{self._base}/operator/{path}", json=wish)
            body: dict[str, Any] = answer.json()
        except httpx2.TransportError as error:
            raise OperationFailed(f"The server at {self._base} does not answer: {error}") from error
        except ValueError as error:
            raise OperationFailed(f"At {self._base} there is something else than creative-upscaler.") from error
        if answer.is_success:
            return body
        raise OperationFailed(str(body.get("detail", f"The server answered {answer.status_code}.")))


@contextmanager
def reach(data: Path | None, url: str | None) -> Iterator[Reached]:
    """The server on a data folder, or at an address.

    Raises:
        OperationFailed: None runs there, or its key is not known.
    """
    chosen: dict[str, Any] = {} if data is None else {"data": data}
    settings = Settings(**chosen)
    verify: ssl.SSLContext | bool = True
    # A key in a folder is that folder's server's: nobody else's server gets it unless the folder is named as well.
    may_read = url is None or data is not None
    if url is None:
        server = read_server(settings)
        if server is None:
            raise OperationFailed(f"No server runs on {settings.data}. Name its folder with --data, or its --url.")
        url = local_url(server)
        if server["own_ca"] and server["tls_port"]:
            verify = ssl.create_default_context(cafile=str(Path(server["trust_dir"]) / "ca.pem"))
    key = os.environ.get("UPSCALER_OPERATOR_KEY") or (known_operator_key(settings) if may_read else None)
    if not key and not may_read:
        raise OperationFailed(
            f"The operator's key of {url} is not known here: set UPSCALER_OPERATOR_KEY, or name its folder with --data."
        )
    if not key:
        raise OperationFailed(
            f"The operator's key is not known here: {settings.operator_key_path} cannot be read. "
            "Run this as the server's user, or set UPSCALER_OPERATOR_KEY."
        )
    headers = {"authorization": f"Key {key}"}
    with httpx2.Client(timeout=ANSWER_S, trust_env=False, headers=headers, verify=verify) as client:
        yield Reached(client, url.rstrip("/"))


def local_url(server: dict[str, Any]) -> str:
    """Where a server of this machine is, by what it tells of itself."""
    if not server["port"]:
        return f"https://localhost:{server['tls_port']}"  # which is what our certificate names
    everywhere = {"0.0.0.0": "127.0.0.1", "::": "::1"}
    host = everywhere.get(server["host"], server["host"])
    return f"http://[{host}]:{server['port']}" if ":" in host else f"http://{host}:{server['port']}"


def describe(found: dict[str, Any]) -> Iterator[str]:
    """A status in lines for people."""
    yield f"mode       {found['mode']}"
    yield "endpoints"
    for name, facts in found["endpoints"].items():
        yield f"  {name:<32}{'ready' if facts['ready'] else 'not ready: ' + facts['detail']}"
    yield "slots"
    for slot in found["slots"]:
        yield f"  {slot['id']:<4}{slot['state']:<10}{slot['weights']:<8}{slot['detail']}{_memory(slot['memory'])}"
        for model in sorted(slot["models"], key=lambda model: -model["size_bytes"]):
            users = ", ".join(model["endpoints"]) or "not used yet"
            yield f"      {model['name']:<24}{_size(model['size_bytes']):>10}  on {model['level']:<8}{users}"
    yield "queue"
    for row in found["queue"]:
        state = "waiting" if row["state"] == "IN_QUEUE" else "running"
        age = f"the oldest came {row['oldest_s']:.0f} s ago"
        yield f"  {row['endpoint']:<32}{row['number']} {state}, priority {row['priority']}, {age}"
    if not found["queue"]:
        yield "  empty"
    webhooks = found["webhooks"]
    oldest = f", the oldest for {webhooks['oldest_s']:.0f} s" if webhooks["pending"] else ""
    yield f"webhooks   {webhooks['pending']} not delivered{oldest}"
    for order in found["orders"]:
        yield f"order      {order['action']} {order['endpoint']}, under way"


def _memory(memory: dict[str, int]) -> str:
    if not memory:
        return ""
    return f", {_size(memory['taken'])} taken, {_size(memory['free'])} of {_size(memory['total'])} free"


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.1f} MB"
