"""Where the bytes of an input come from: http(s), with a check of the address that is dialled, and data URIs.

A URL from a stranger must not reach what only this machine can reach. Names, spellings of addresses and redirects are
too many to judge as text, so the check sits where the connection is made: a name is resolved once, each address is
judged, and exactly that address is dialled, with the name kept for `Host` and TLS.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import re
import socket
import ssl
import time
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import httpcore2
import httpx2

from server.schemas import BLOB
from server.storage import Storage

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolver: TypeAlias = Callable[[str, int], list[str]]

MAX_REDIRECTS = 5
CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 15.0
MAX_ADDRESSES = 4
CHUNK_BYTES = 65536
POLL_S = 0.5  # no wait for the network lasts longer before we look at the time and at who asked
WRITE_BYTES = 16384
WEB_PORTS = frozenset({80, 443})
USER_AGENT = "creative-upscaler/0.1"

# IANA special-purpose registry; `ipaddress.is_global` of Python 3.11 to 3.13 lets multicast and some of these pass.
CLOSED_IPV4 = tuple(
    ipaddress.IPv4Network(text)
    for text in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
    )
)
GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
# Inside global unicast: protocol assignments with Teredo and ORCHID, documentation, 6to4. Teredo and 6to4 carry an
# IPv4 address of the writer's choice and nobody serves pictures over them.
CLOSED_IPV6 = tuple(ipaddress.IPv6Network(text) for text in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"))
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
# Cloud metadata services answer on link-local addresses and on these two.
METADATA = frozenset({ipaddress.ip_address("fd00:ec2::254"), ipaddress.ip_address("100.100.100.200")})

DATA_URI = re.compile(r"data:(?P<kind>[^,;]*)(?P<parameters>(?:;[^,;]*)*),", re.IGNORECASE)


class InputError(Exception):
    """An input could not be had; the message says why and what to do."""


class DownloadFailed(InputError):
    """The file is not where the URL says, or may not be fetched from there."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"Failed to download the file: {reason}. Please check if the URL is accessible and try again.")


class FileTooLarge(InputError):
    """The file has more bytes than this server accepts."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__(f"The file is larger than {max_bytes} bytes.")
        self.max_bytes = max_bytes


class MalformedDataURI(InputError):
    """The data URI does not follow RFC 2397."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"Failed to load the image: {reason}.")


class AddressRefused(httpcore2.ConnectError):
    """The address behind a URL is one that strangers may not make this server dial."""


def is_public_address(address: Address) -> bool:
    """Whether an address is reachable on the public internet and means the same from everywhere."""
    if isinstance(address, ipaddress.IPv6Address):
        embedded = embedded_ipv4(address)
        if embedded is not None:
            return is_public_address(embedded)
        return address in GLOBAL_UNICAST and not any(address in network for network in CLOSED_IPV6)
    return not any(address in network for network in CLOSED_IPV4)


def embedded_ipv4(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that the network will really be asked for: IPv4-mapped and NAT64 (RFC 6052)."""
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return ipaddress.IPv4Address(address.packed[-4:]) if address in NAT64 else None


def is_metadata(address: Address) -> bool:
    """Whether an address is link-local or one of the cloud metadata services, which no client has business with."""
    if isinstance(address, ipaddress.IPv6Address):
        embedded = embedded_ipv4(address)
        if embedded is not None:
            return is_metadata(embedded)
    return address.is_link_local or address in METADATA


@dataclass(frozen=True, kw_only=True)
class Reach:
    """What may be dialled on behalf of a caller.

    Attributes:
        allow_hosts: `host` or `host:port`, lower case, that are allowed wherever they lie.
        ports: Ports allowed on every other host; None allows all.
        private: Whether private addresses are allowed too; link-local and metadata addresses never are.
    """

    allow_hosts: frozenset[str] = frozenset()
    ports: frozenset[int] | None = WEB_PORTS
    private: bool = False

    @classmethod
    def naming(cls, hosts: Iterable[str]) -> Reach:
        """Public web servers, and these hosts on whatever address and port they are."""
        return cls(allow_hosts=frozenset(host.strip().lower().rstrip(".") for host in hosts if host.strip()))

    def names(self, host: str, port: int) -> bool:
        """Whether the operator allowed this host by name."""
        host = host.lower().rstrip(".")
        bracketed = f"[{host}]" if ":" in host else host
        return not self.allow_hosts.isdisjoint({host, bracketed, f"{bracketed}:{port}"})

    def check(self, host: str, port: int, address: str) -> None:
        """Raise `AddressRefused` unless `address`, one of those of `host`, may be dialled on `port`."""
        if self.names(host, port):
            return
        found = ipaddress.ip_address(address.partition("%")[0])
        if not (is_public_address(found) or (self.private and not is_metadata(found))):
            raise AddressRefused(
                f"{host} is on an address that is not public; the operator can allow it with "
                f"UPSCALER_FETCH_ALLOW_HOSTS={host}"
            )
        if self.ports is not None and port not in self.ports:
            raise AddressRefused(f"port {port} is not allowed; use one of {', '.join(map(str, sorted(self.ports)))}")


def _wait_on() -> None:
    """Whoever waits has not changed their mind."""


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long one exchange may take, however often a byte of it arrives.

    Attributes:
        deadline: When it ends, in `time.monotonic`'s seconds.
        poll: Called at least every `POLL_S` seconds while we wait for the other server; may raise to end the exchange.
    """

    deadline: float = float("inf")
    poll: Callable[[], None] = _wait_on

    @classmethod
    def of(cls, timeout_s: float, poll: Callable[[], None] = _wait_on) -> Patience:
        """So many seconds from now."""
        return cls(deadline=time.monotonic() + timeout_s, poll=poll)

    @property
    def is_over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() >= self.deadline

    def left_s(self, timeout: float | None) -> float | None:
        """Seconds that a single operation may take, `timeout` at most; polls first.

        Raises:
            httpcore2.ReadTimeout: The time is up.
        """
        self.poll()
        left_s = self.deadline - time.monotonic()
        if left_s <= 0:
            raise httpcore2.ReadTimeout("the exchange took too long")
        return None if timeout is None and left_s == float("inf") else min(left_s, timeout or left_s)


class PatientStream(httpcore2.NetworkStream):
    """A connection whose reads and writes end with the patience of the exchange; a plain timeout is one of silence."""

    def __init__(self, stream: httpcore2.NetworkStream, patience: Patience) -> None:
        self._stream, self._patience = stream, patience

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """What has arrived, `max_bytes` at most."""
        silent_from = time.monotonic()
        while True:
            wait_s = min(self._patience.left_s(timeout) or POLL_S, POLL_S)
            try:
                return self._stream.read(max_bytes, wait_s)
            except httpcore2.ReadTimeout:
                if timeout is not None and time.monotonic() - silent_from >= timeout:
                    raise

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Send everything, in pieces small enough that a slow reader is noticed between them."""
        for start in range(0, len(buffer), WRITE_BYTES):
            self._stream.write(buffer[start : start + WRITE_BYTES], self._patience.left_s(timeout))

    def close(self) -> None:
        """Hang up."""
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        """The same connection under TLS."""
        secured = self._stream.start_tls(ssl_context, server_hostname, self._patience.left_s(timeout))
        return PatientStream(secured, self._patience)

    def get_extra_info(self, info: str) -> Any:
        """What is known of the connection."""
        return self._stream.get_extra_info(info)


def resolve(host: str, port: int) -> list[str]:
    """The addresses of a host in the resolver's order; accepts every spelling of a number that the system does."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class GuardedBackend(httpcore2.NetworkBackend):
    """Dials only addresses within reach; the name is resolved once and never again by the layers below."""

    def __init__(self, reach: Reach, resolver: Resolver, patience: Patience) -> None:
        self._reach, self._resolve, self._patience = reach, resolver, patience
        self._dial = httpcore2.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.NetworkStream:
        """Connect to the first address of `host` that answers; refused when any of them is out of reach."""
        try:
            addresses = self._resolve(host, port)[:MAX_ADDRESSES]
        except (OSError, UnicodeError) as error:
            raise httpcore2.ConnectError(f"the name {host} could not be resolved") from error
        for address in addresses:
            self._reach.check(host, port, address)
        failure: Exception = httpcore2.ConnectError(f"the name {host} has no address")
        for address in addresses:
            try:
                wait_s = self._patience.left_s(timeout)
                stream = self._dial.connect_tcp(address, port, wait_s, local_address, socket_options or ())
                return PatientStream(stream, self._patience)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
        raise failure

    def connect_unix_socket(self, path: str, timeout: float | None = None, socket_options: Any = None) -> Any:
        """Unix sockets are out of reach."""
        raise AddressRefused("Unix sockets are not reached by URL")


class _Body(httpx2.SyncByteStream):
    def __init__(self, stream: Iterable[bytes]) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._stream)

    def close(self) -> None:
        close = getattr(self._stream, "close", None)
        if close is not None:
            close()


class GuardedTransport(httpx2.BaseTransport):
    """httpx2's way to the network with our backend under it; connections are not kept, so each one is checked.

    The extension `patience` of a request, if given, bounds the whole of its exchange.
    """

    def __init__(self, reach: Reach, resolver: Resolver = resolve, verify: ssl.SSLContext | None = None) -> None:
        self._reach, self._resolver = reach, resolver
        self._ssl_context = verify or httpx2.create_ssl_context()

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send one request; errors are httpcore2's."""
        url = request.url
        patience = request.extensions.get("patience", Patience())
        # A pool per request, because its backend is where patience is known; it ends with its one connection.
        pool = httpcore2.ConnectionPool(
            ssl_context=self._ssl_context,
            max_keepalive_connections=0,
            network_backend=GuardedBackend(self._reach, self._resolver, patience),
        )
        response = pool.handle_request(
            httpcore2.Request(
                method=request.method,
                url=httpcore2.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
                headers=request.headers.raw,
                content=request.stream,
                extensions=request.extensions,
            )
        )
        return httpx2.Response(
            status_code=response.status,
            headers=response.headers,
            stream=_Body(response.stream),  # type: ignore[arg-type]  # the pool is a synchronous one
            extensions=response.extensions,
        )


def guarded_client(
    reach: Reach, *, resolver: Resolver = resolve, verify: ssl.SSLContext | None = None
) -> httpx2.Client:
    """An HTTP client that dials only what is within reach, and takes neither redirects nor proxies from others."""
    return httpx2.Client(
        transport=GuardedTransport(reach, resolver, verify),
        trust_env=False,
        follow_redirects=False,
        headers={"user-agent": USER_AGENT},
        timeout=httpx2.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
    )


@dataclass
class Fetcher:
    """Downloads inputs within limits of time and size; safe to use from several threads.

    Attributes:
        client: From `guarded_client`.
        max_bytes: Bytes a file may have, counted after decoding of its transfer.
        timeout_s: Seconds a download may take in all, redirects included.
        tokens: What to show to hosts that ask who we are, None where that is nobody's business. A name alone stands
            for HTTPS on its usual port, `host:port` for that port with and without TLS; a redirect to any other host
            never carries it.
        keeps_tls: Whether a redirect from HTTPS to plain HTTP fails the download.
    """

    client: httpx2.Client
    max_bytes: int
    timeout_s: float
    tokens: Mapping[str, str] | None = field(default=None, repr=False)
    keeps_tls: bool = False

    def fetch(self, url: str, poll: Callable[[], None] = _wait_on) -> bytes:
        """Download a file; follows up to five redirects, each checked like the first address.

        `poll` is called every half second and may raise to stop the download.

        Raises:
            DownloadFailed: The URL, the network or the other server is at fault.
            FileTooLarge: More than `max_bytes`.
        """
        with self.open(url, {"accept": "image/*,*/*;q=0.5"}, poll) as response:
            if response.status_code != 200:
                raise DownloadFailed(f"the server answered {response.status_code}")
            return self._read(response)

    @contextmanager
    def open(
        self, url: str, headers: Mapping[str, str], poll: Callable[[], None] = _wait_on
    ) -> Iterator[httpx2.Response]:
        """The answer to a request, its body not read yet; redirects are followed and checked.

        What goes wrong inside the block is translated as well.

        Raises:
            DownloadFailed: The URL, the network or the other server is at fault, or answered 400 or above (but 416).
        """
        patience = Patience.of(self.timeout_s, poll)
        try:
            for _ in range(MAX_REDIRECTS + 1):
                with ExitStack() as stack:
                    response = stack.enter_context(self._request(url, headers, patience))
                    if response.status_code in REDIRECTS and "location" in response.headers:
                        url = self._redirected(response)
                        continue
                    if response.status_code >= 400 and response.status_code != RANGE_NOT_SATISFIABLE:
                        raise DownloadFailed(f"the server answered {response.status_code}{self._way_in(response)}")
                    yield response
                    return
        except (httpx2.InvalidURL, httpx2.UnsupportedProtocol, httpcore2.UnsupportedProtocol) as error:
            raise DownloadFailed(f"{url[:200]!r} is not a URL of the form http(s)://host/path") from error
        except AddressRefused as error:
            raise DownloadFailed(str(error)) from error
        except (httpx2.HTTPError, *NETWORK_ERRORS) as error:
            late = f"it took longer than {self.timeout_s:g} s" if patience.is_over else None
            raise DownloadFailed(late or str(error) or type(error).__name__) from error
        raise DownloadFailed(f"more than {MAX_REDIRECTS} redirects")

    @contextmanager
    def _request(self, url: str, headers: Mapping[str, str], patience: Patience) -> Iterator[httpx2.Response]:
        with ExitStack() as stack:
            try:
                target = httpx2.URL(url)
                if target.scheme not in ("http", "https") or not target.host:
                    raise httpx2.UnsupportedProtocol(url)
                shown = {**headers, **self._credentials(target)}
                stream = self.client.stream("GET", target, headers=shown, extensions={"patience": patience})
                response = stack.enter_context(stream)
            except ValueError as error:
                raise httpx2.UnsupportedProtocol(url) from error
            yield response

    def _redirected(self, response: httpx2.Response) -> str:
        target = response.url.join(response.headers["location"])
        if self.keeps_tls and response.url.scheme == "https" and target.scheme == "http":
            raise DownloadFailed("the server redirects from HTTPS to plain HTTP, where anybody could change the file")
        return str(target)

    def _way_in(self, response: httpx2.Response) -> str:
        if self.tokens is None or response.status_code not in GATED:
            return ""
        return f" (the operator can give a token for {response.url.host} in UPSCALER_FETCH_TOKENS)"

    def _credentials(self, url: httpx2.URL) -> dict[str, str]:
        if self.tokens is None:
            return {}
        port = url.port or (443 if url.scheme == "https" else 80)
        token = self.tokens.get(f"{url.host}:{port}")
        if token is None and url.scheme == "https" and port == 443:
            token = self.tokens.get(url.host)
        return {"authorization": f"Bearer {token}"} if token else {}

    def _read(self, response: httpx2.Response) -> bytes:
        announced = response.headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > self.max_bytes:
            raise FileTooLarge(self.max_bytes)
        body = bytearray()
        for chunk in response.iter_bytes(CHUNK_BYTES):
            body += chunk
            if len(body) > self.max_bytes:
                raise FileTooLarge(self.max_bytes)
        return bytes(body)


def read_input(reference: str, storage: Storage, fetcher: Fetcher, poll: Callable[[], None] = _wait_on) -> bytes:
    """The bytes of a job's input, on the calling thread: `blob:<key>` from storage, everything else by URL.

    Raises:
        InputError: It cannot be had; see the subclasses.
        Exception: What `poll` raises.
    """
    if not reference.startswith(BLOB):
        return fetcher.fetch(reference, poll)
    try:
        return storage.read(reference.removeprefix(BLOB))
    except FileNotFoundError as error:
        raise DownloadFailed("the file is not kept here any more") from error


REDIRECTS = (301, 302, 303, 307, 308)
GATED = (401, 403)
RANGE_NOT_SATISFIABLE = 416
NETWORK_ERRORS = (httpcore2.TimeoutException, httpcore2.NetworkError, httpcore2.ProtocolError)


def decode_data_uri(uri: str, max_bytes: int) -> bytes:
    """The bytes of a data URI (RFC 2397), base64 or percent-encoded.

    Raises:
        MalformedDataURI: It is not one, or its base64 is broken.
        FileTooLarge: It would decode to more than `max_bytes`; found before decoding.
    """
    head = DATA_URI.match(uri)
    if head is None:
        raise MalformedDataURI("a data URI has the form data:<type>;base64,<data>")
    body = uri[head.end() :]
    is_base64 = head["parameters"].lower().endswith(";base64")
    # Four letters of base64 are three bytes; percent-encoding never grows. Line breaks only make the estimate high.
    if len(body) * (0.75 if is_base64 else 1 / 3) - 3 > max_bytes:
        raise FileTooLarge(max_bytes)
    data = _from_base64(urllib.parse.unquote(body)) if is_base64 else urllib.parse.unquote_to_bytes(body)
    if len(data) > max_bytes:
        raise FileTooLarge(max_bytes)
    return data


def _from_base64(text: str) -> bytes:
    letters = "".join(text.split()).translate(str.maketrans("-_", "+/")).rstrip("=")
    try:
        return base64.b64decode(letters + "=" * (-len(letters) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise MalformedDataURI("the base64 of its data URI is broken") from error
