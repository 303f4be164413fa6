"""Uses fal-client exactly as its documentation does, and prints as JSON what came back.

Called as `client.py sync|async VERB ARGUMENTS`; knows the server only by its environment.
"""

import asyncio
import json
import sys
import time

import fal_client

ENDPOINT = "fal-ai/creative-upscaler"


def describe(update):
    """An update's kind, and its log lines where it has some."""
    return [type(update).__name__, [line["message"] for line in getattr(update, "logs", None) or ()]]


def report_error(error):
    """What a user of the client sees of a failed request."""
    return {"status": error.status_code, "detail": error.message, "type": error.error_type}


def run(arguments):
    """fal_client.run"""
    return {"result": fal_client.run(ENDPOINT, arguments=arguments)}


def submit(arguments):
    """fal_client.submit, then the handle's status, events and result."""
    handle = fal_client.submit(ENDPOINT, arguments=arguments)
    first = describe(handle.status(with_logs=True))
    events = [describe(event) for event in handle.iter_events(with_logs=True, interval=0.05)]
    again = fal_client.result(ENDPOINT, handle.request_id)
    return {"first": first, "events": events, "result": handle.get(), "again": again}


def subscribe(arguments):
    """fal_client.subscribe with logs."""
    updates, ids = [], []
    result = fal_client.subscribe(
        ENDPOINT,
        arguments=arguments,
        with_logs=True,
        on_enqueue=ids.append,
        on_queue_update=lambda update: updates.append(describe(update)),
    )
    return {"ids": ids, "updates": updates, "result": result}


def cancel(arguments):
    """Cancel once it runs; seconds until the status says that it is over."""
    handle = fal_client.submit(ENDPOINT, arguments=arguments)
    while not any("denoise" in line for line in describe(handle.status(with_logs=True))[1]):
        time.sleep(0.02)
    started = time.monotonic()
    handle.cancel()
    while not isinstance(handle.status(), fal_client.Completed):
        time.sleep(0.01)
    seconds = time.monotonic() - started
    try:
        return {"result": handle.get()}
    except fal_client.FalClientHTTPError as error:
        return {"seconds": seconds, **report_error(error)}


def follow(arguments):
    """Submit with a webhook, say the request's URLs in a first line, then poll until the result is there."""
    handle = fal_client.submit(ENDPOINT, arguments=arguments["input"], webhook_url=arguments["webhook"])
    urls = {"request_id": handle.request_id, "status_url": handle.status_url}
    sys.stdout.write(json.dumps(urls) + "\n")
    sys.stdout.flush()
    return {"result": handle.get()}


async def run_async(arguments):
    """fal_client.run_async"""
    return {"result": await fal_client.run_async(ENDPOINT, arguments=arguments)}


async def submit_async(arguments):
    """fal_client.submit_async, then the handle's status, events and result."""
    handle = await fal_client.submit_async(ENDPOINT, arguments=arguments)
    first = describe(await handle.status(with_logs=True))
    events = [describe(event) async for event in handle.iter_events(with_logs=True, interval=0.05)]
    again = await fal_client.result_async(ENDPOINT, handle.request_id)
    return {"first": first, "events": events, "result": await handle.get(), "again": again}


async def subscribe_async(arguments):
    """fal_client.subscribe_async with logs."""
    updates, ids = [], []
    result = await fal_client.subscribe_async(
        ENDPOINT,
        arguments=arguments,
        with_logs=True,
        on_enqueue=ids.append,
        on_queue_update=lambda update: updates.append(describe(update)),
    )
    return {"ids": ids, "updates": updates, "result": result}


async def cancel_async(arguments):
    """Cancel once it runs; seconds until the status says that it is over."""
    handle = await fal_client.submit_async(ENDPOINT, arguments=arguments)
    while not any("denoise" in line for line in describe(await handle.status(with_logs=True))[1]):
        await asyncio.sleep(0.02)
    started = time.monotonic()
    await handle.cancel()
    while not isinstance(await handle.status(), fal_client.Completed):
        await asyncio.sleep(0.01)
    seconds = time.monotonic() - started
    try:
        return {"result": await handle.get()}
    except fal_client.FalClientHTTPError as error:
        return {"seconds": seconds, **report_error(error)}


SYNC = {"run": run, "submit": submit, "subscribe": subscribe, "cancel": cancel, "follow": follow}
ASYNC = {"run": run_async, "submit": submit_async, "subscribe": subscribe_async, "cancel": cancel_async}


if __name__ == "__main__":
    kind, verb, text = sys.argv[1:]
    try:
        work = json.loads(text)
        answer = SYNC[verb](work) if kind == "sync" else asyncio.run(ASYNC[verb](work))
    except fal_client.FalClientHTTPError as error:
        answer = report_error(error)
    sys.stdout.write(json.dumps(answer))
