"""Uses the queue client of fal's SDK, and prints as JSON what came back; knows the server only by its environment."""

import json
import sys

import fal.apps
import httpx

ENDPOINT = "fal-ai/creative-upscaler"


def queue(arguments):
    """submit, the states on the way, the result."""
    handle = fal.apps.submit(ENDPOINT, arguments)
    states = [type(state).__name__ for state in handle.iter_events(logs=True)]
    last = handle.status(logs=True)
    return {
        "states": states,
        "last": [type(last).__name__, last.error],
        "logs": [line["message"] for line in last.logs],
        "result": handle.fetch_result(),
        "run": fal.apps.run(ENDPOINT, arguments),
    }


def refused(arguments):
    """The result of an input that is refused."""
    handle = fal.apps.submit(ENDPOINT, {**arguments, "scale": 9})
    try:
        return {"result": handle.get()}
    except httpx.HTTPStatusError as error:
        last = handle.status()
        return {"status": error.response.status_code, "last": [type(last).__name__, last.error_type]}


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    sys.stdout.write(json.dumps({"package": fal.__file__, **queue(arguments), "refused": refused(arguments)}))
