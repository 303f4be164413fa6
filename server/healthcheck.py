"""`python -m server.healthcheck`: exits 0 while the server on this data folder can take a request, 1 otherwise.

For the image's HEALTHCHECK and for supervisors. It asks where the running server says that it listens, so it is right
whatever ports, certificates and keys were chosen, and whether on the command line or elsewhere.
"""

from __future__ import annotations

import sys
from typing import Any

import httpx2

from server.__main__ import read_settings
from server.supervisor import read_server

PATIENCE_S = 5.0
EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def main() -> None:
    """Ask once; what is wrong goes to standard error."""
    server = read_server(read_settings())
    if server is None:
        sys.exit("no server runs")
    try:
        # Not verified: it is this machine, and the operator's certificate names the public address.
        answer = httpx2.get(f"{address(server)}/ready", verify=False, trust_env=False, timeout=PATIENCE_S)
    except httpx2.TransportError as error:
        sys.exit(f"no answer: {error}")
    if answer.status_code != 200:
        sys.exit(f"not ready: {answer.text}")


def address(server: dict[str, Any]) -> str:
    """Where a server that describes itself so is reached from its own machine."""
    host = EVERYWHERE.get(server["host"], server["host"])
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{server['port']}" if server["port"] else f"https://{name}:{server['tls_port']}"


if __name__ == "__main__":
    main()
