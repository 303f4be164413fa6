"""Uses what every release of fal-client has had since 0.4, sync and async, and prints as JSON what came back.

Called as `old_client.py VERB JSON`; knows the server only by its environment.
"""

import asyncio
import hashlib
import json
import sys

import fal_client
import httpx

ENDPOINT = "fal-ai/creative-upscaler"
DATA = b"seven bytes" * 4000


def queue(arguments):
    """submit, its events, its result; the same result by the request's id."""
    handle = fal_client.submit(ENDPOINT, arguments=arguments)
    events = [type(event).__name__ for event in handle.iter_events(with_logs=True, interval=0.05)]
    client = fal_client.SyncClient()
    again = client.get_handle(ENDPOINT, handle.request_id)
    same_urls = (again.status_url, again.response_url) == (handle.status_url, handle.response_url)
    return {"events": events, "result": handle.get(), "again": again.get(), "same_urls": same_urls}


async def queue_async(arguments):
    """The same with the client's asynchronous half."""
    handle = await fal_client.submit_async(ENDPOINT, arguments=arguments)
    events = [type(event).__name__ async for event in handle.iter_events(with_logs=True, interval=0.05)]
    return {"events": events, "result": await handle.get()}


def subscribe(arguments):
    """subscribe, in releases that have it."""
    if not hasattr(fal_client, "subscribe"):
        return queue(arguments)["result"]
    return fal_client.subscribe(ENDPOINT, arguments=arguments, with_logs=True)


async def everything_async(arguments):
    """run and queue, in one event loop, for the client keeps its connections there."""
    return {
        "run_async": await fal_client.run_async(ENDPOINT, arguments=arguments),
        "queue_async": await queue_async(arguments),
    }


def use(arguments):
    """Everything but uploads."""
    return {
        "run": fal_client.run(ENDPOINT, arguments=arguments),
        "queue": queue(arguments),
        "subscribe": subscribe(arguments),
        **asyncio.run(everything_async(arguments)),
    }


def upload(arguments):
    """upload, and the file read back."""
    url = fal_client.upload(DATA, "application/octet-stream")
    return {"url": url, "same": hashlib.sha256(httpx.get(url).content).digest() == hashlib.sha256(DATA).digest()}


if __name__ == "__main__":
    verb, text = sys.argv[1:]
    answer = {"use": use, "upload": upload}[verb](json.loads(text))
    sys.stdout.write(json.dumps({"package": fal_client.__file__, **answer}))
