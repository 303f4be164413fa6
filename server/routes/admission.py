"""From an HTTP request to a row in the ledger: what run and submit have in common."""

from __future__ import annotations

import asyncio
import json
import re
import time
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import unquote, urlsplit

from server.endpoints import Endpoint
from server.errors import DOWNLOAD_FAILED, Draining, InvalidInput, detail_item, model_errors
from server.gateway import Gateway
from server.inputs import FileTooLarge, MalformedDataURI, decode_data_uri
from server.ledger import Mode, NewLog, NewRequest
from server.routes.dependencies import MEBIBYTE, Call
from server.schemas import BLOB, Base
from server.storage import is_public

FOREVER_S = 100 * 365 * 86400.0
MAX_NAMED_FIELDS = 20
MAX_URL = 8192  # characters; longer than what web servers take
BASE_MODEL = "base_model_url"
MODEL_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95}(@[A-Za-z0-9][\w./-]{0,95})?)?", re.ASCII)
LIFECYCLE = "x-fal-object-lifecycle-preference"


async def admit(call: Call, payload: Any, *, webhook_url: str | None = None) -> NewRequest:
    """The request that the ledger is to accept; an invalid input makes one that is over already, with its 422.

    Raises:
        Draining: The operator lets nothing new in.
    """
    if await call.gateway.ledger.mode() is Mode.DRAINING:
        raise Draining
    headers = dict(call.request.headers)
    new = NewRequest(
        id=str(uuid.uuid4()),
        endpoint=call.endpoint.id,
        job=None,
        priority="low" if headers.get("x-fal-queue-priority", "").strip().lower() == "low" else "normal",
        start_deadline=start_deadline(headers),
        webhook_url=webhook_url,
        caller=call.caller,
        store_io=headers.get("x-fal-store-io", "").strip() != "0",
        base_url=call.base.root,
        expires_s=lifecycle_s(headers.get(LIFECYCLE), LIFECYCLE),
        retry=headers.get("x-fal-no-retry", "").strip().lower() not in ("1", "true", "yes"),
    )
    try:
        job = call.endpoint.job(call.endpoint.parse(payload))
        reference = await place_input(call.gateway, job["image"], call.base, "image_url")
        files = {
            parameter: await place_input(call.gateway, url, call.base, job.get("fields", {}).get(parameter, parameter))
            for parameter, url in job.get("files", {}).items()
        }
    except InvalidInput as error:
        refusal = model_errors(error.items)
        call.gateway.metrics.ended.count(new.endpoint, refusal)
        return replace(new, outcome=refusal)
    return replace(
        new,
        job={**job, "image": reference, "files": files},
        logs=tuple(_warn([*_unknown(call.endpoint, payload), *job["warnings"]])),
        blobs=tuple(found.removeprefix(BLOB) for found in (reference, *files.values()) if found.startswith(BLOB)),
    )


def start_deadline(headers: Mapping[str, str]) -> float | None:
    """The time after which the caller does not want the request started; the newer header counts."""
    for name in ("x-fal-request-start-timeout", "x-fal-request-timeout"):
        try:
            seconds = float(headers.get(name, ""))
        except ValueError:
            continue
        if 0 < seconds < FOREVER_S:
            return time.time() + seconds
    return None


def lifecycle_s(text: str | None, name: str) -> float | None:
    """Seconds a file shall be kept, from fal's lifecycle header; None: as long as the settings say.

    Raises:
        InvalidInput: The header is not what fal documents.
    """
    if not text:
        return None
    try:
        preference = json.loads(text)
        seconds = preference["expiration_duration_seconds"] if preference else None
        if seconds is None:
            return FOREVER_S if preference and "expiration_duration_seconds" in preference else None
        if isinstance(seconds, bool) or not 0 < float(seconds) <= FOREVER_S:
            raise ValueError(seconds)
        return float(seconds)
    except KeyError:
        return None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        item = detail_item(
            "value_error",
            'Expected JSON of the form {"expiration_duration_seconds": seconds or null}',
            loc=("header", name),
            input=text,
        )
        raise InvalidInput([item]) from error


async def place_input(gateway: Gateway, url: str, base: Base, field: str) -> str:
    """What the slot shall read: a URL, or `blob:<key>` for a data URI, stored here, and for a file of ours.

    A base model may also be a name; what it stands for only the slot knows.

    Raises:
        InvalidInput: It is neither a data URI nor an http(s) URL, the URL is too long, or it names a file that we do
            not have.
    """
    if url[:5].lower() == "data:":
        max_bytes = int(gateway.settings.max_download_mb * MEBIBYTE)
        try:
            data = await asyncio.to_thread(decode_data_uri, url, max_bytes)
        except FileTooLarge as error:
            raise _bad_input(field, "file_too_large", str(error), url, {"max_size": error.max_bytes}) from error
        except MalformedDataURI as error:
            raise _bad_input(field, "image_load_error", str(error), url) from error
        return BLOB + await gateway.store_input(data)
    if field == BASE_MODEL and MODEL_NAME.fullmatch(url):
        return url
    if len(url) > MAX_URL:
        msg = f"A URL should have at most {MAX_URL} characters; upload the file or pass it as a data URI"
        raise _bad_input(field, "sequence_too_long", msg, url, {"max_length": MAX_URL})
    key = own_key(url, {urlsplit(base.root).netloc.lower(), *gateway.own_hosts}, field)
    if key is None:
        return url
    if not await gateway.hold_stored(key):
        raise _bad_input(field, "file_download_error", DOWNLOAD_FAILED, url)
    return BLOB + key


def own_key(url: str, own_hosts: Collection[str], field: str = "image_url") -> str | None:
    """The key of a file of ours that a URL names; None for any other URL.

    Raises:
        InvalidInput: It is not an http(s) URL.
    """
    try:
        parts = urlsplit(url.strip())
        host = parts.hostname
    except ValueError as error:
        raise _bad_input(field, "file_download_error", DOWNLOAD_FAILED, url) from error
    if parts.scheme.lower() not in ("http", "https") or not host:
        raise _bad_input(field, "file_download_error", f"{DOWNLOAD_FAILED} Expected an http(s) URL or a data URI.", url)
    path = unquote(parts.path)
    key = path.partition("/files/")[2]
    return key if parts.netloc.lower() in own_hosts and is_public(key) else None


def _bad_input(field: str, kind: str, msg: str, value: str, ctx: Mapping[str, Any] | None = None) -> InvalidInput:
    return InvalidInput([detail_item(kind, msg, loc=("body", field), ctx=ctx, input=value[:200])])


def _unknown(endpoint: Endpoint[Any], payload: Any) -> list[str]:
    names = endpoint.unknown_fields(payload)
    lines = [f"unknown field {name[:100]!r} is ignored" for name in names[:MAX_NAMED_FIELDS]]
    if len(names) > MAX_NAMED_FIELDS:
        lines.append(f"{len(names) - MAX_NAMED_FIELDS} more unknown fields are ignored")
    return lines


def _warn(lines: Sequence[str]) -> list[NewLog]:
    now = time.time()
    return [NewLog(now, "WARN", line) for line in lines]
