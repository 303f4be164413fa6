"""Subscribes to endpoints with nothing but a picture, and prints as JSON what each answered.

Called as `endpoints_client.py JSON ID...`; knows the server only by its environment.
"""

import json
import sys

import fal_client


def subscribe(endpoint, arguments):
    """The result, and the same once more by the request's id."""
    ids = []
    result = fal_client.subscribe(endpoint, arguments=arguments, with_logs=True, on_enqueue=ids.append)
    return {"result": result, "again": fal_client.result(endpoint, ids[0])}


if __name__ == "__main__":
    text, *endpoints = sys.argv[1:]
    sys.stdout.write(json.dumps({endpoint: subscribe(endpoint, json.loads(text)) for endpoint in endpoints}))
