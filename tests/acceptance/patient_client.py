"""Uses what fal-client offers to those who wait, or who do not want to, and prints as JSON what came of it.

Called as `patient_client.py VERB JSON`; knows the server only by its environment.
"""

import json
import sys
import threading
import time

import fal_client
from httpx_sse import SSEError

ENDPOINT = "fal-ai/creative-upscaler"


def refusal(call, **options):
    """What a call that fails raises: status, headers that matter, type, and seconds until then."""
    started = time.monotonic()
    try:
        return {"result": call(ENDPOINT, **options)}
    except fal_client.FalClientHTTPError as error:
        return {
            "status": error.status_code,
            "type": error.error_type,
            "timeout_type": error.response_headers.get("x-fal-request-timeout-type"),
            "seconds": time.monotonic() - started,
        }


def start_late(arguments):
    """The queue and a direct run, both with a start timeout that cannot be kept."""
    return [refusal(call, arguments=arguments, start_timeout=1.2) for call in (fal_client.subscribe, fal_client.run)]


def start_in_time(arguments):
    """A start timeout that is kept by a request that takes longer than it."""
    return refusal(fal_client.subscribe, arguments=arguments, start_timeout=1.2)


def give_up(arguments):
    """subscribe with a client timeout."""
    started = time.monotonic()
    try:
        return {"result": fal_client.subscribe(ENDPOINT, arguments=arguments, client_timeout=2)}
    except fal_client.FalClientTimeoutError as error:
        return {"request_id": error.request_id, "seconds": time.monotonic() - started}


def stand_in_line(arguments):
    """Events of a request behind another, which is cancelled once the first event is there."""
    ahead = fal_client.submit(ENDPOINT, arguments=arguments["ahead"])
    handle = fal_client.submit(ENDPOINT, arguments=arguments["input"])
    events = []
    for event in handle.iter_events(with_logs=True, interval=0.05):
        if not events:
            ahead.cancel()
        events.append([type(event).__name__, getattr(event, "position", None), getattr(event, "metrics", None)])
    return events


def stream(arguments):
    """The events of a stream; then what a stream of an application that does not exist raises."""
    events = list(fal_client.stream(ENDPOINT, arguments=arguments))
    try:
        unknown = list(fal_client.stream("fal-ai/no-such-thing", arguments=arguments))
    except SSEError as error:
        unknown = type(error).__name__
    return {"events": events, "unknown": unknown}


def crowd(arguments):
    """Many clients that poll one request at the default rate: their results, and seconds of each status call."""
    handle = fal_client.submit(ENDPOINT, arguments=arguments["input"])
    seconds, results = [], []

    def poll():
        client = fal_client.SyncClient()
        mine = client.get_handle(ENDPOINT, handle.request_id)
        while True:
            started = time.monotonic()
            status = mine.status()
            seconds.append(time.monotonic() - started)
            if isinstance(status, fal_client.Completed):
                break
            time.sleep(0.1)
        results.append(mine.get())

    threads = [threading.Thread(target=poll) for _ in range(arguments["clients"])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"seconds": sorted(seconds), "results": results}


VERBS = {
    "start_late": start_late,
    "start_in_time": start_in_time,
    "give_up": give_up,
    "stand_in_line": stand_in_line,
    "stream": stream,
    "crowd": crowd,
}


if __name__ == "__main__":
    verb, text = sys.argv[1:]
    sys.stdout.write(json.dumps(VERBS[verb](json.loads(text))))
