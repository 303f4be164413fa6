"""Uses fal-client's uploads as its documentation does, reads every file back, and prints as JSON what came back.

Called as `upload_client.py VERB JSON`; knows the server only by its environment.
"""

import asyncio
import hashlib
import io
import json
import sys

import fal_client
import httpx
from PIL import Image

ENDPOINT = "fal-ai/creative-upscaler"
TEXT = b"plain \x00 bytes" * 1000


def digest(url):
    """The SHA-256 of what a URL gives, and its media type."""
    found = hashlib.sha256()
    with httpx.stream("GET", url, timeout=60.0) as answer:
        answer.raise_for_status()
        for chunk in answer.iter_bytes():
            found.update(chunk)
    return [found.hexdigest(), answer.headers["content-type"]]


def picture(path):
    """A picture as Pillow has it, and the bytes that the client makes of it."""
    image = Image.open(path)
    file = io.BytesIO()
    image.save(file, format="png")
    return image, hashlib.sha256(file.getvalue()).hexdigest()


def small(arguments):
    """upload, upload_image, and an upscale of the uploaded picture."""
    image, expected = picture(arguments["picture"])
    text_url = fal_client.upload(TEXT, "text/plain")
    image_url = fal_client.upload_image(image, format="png")
    return {
        "text": [text_url, *digest(text_url), hashlib.sha256(TEXT).hexdigest()],
        "image": [image_url, *digest(image_url), expected],
        "result": fal_client.run(ENDPOINT, arguments={**arguments["input"], "image_url": image_url}),
    }


def large(arguments):
    """upload_file of a file that goes up in parts."""
    url = fal_client.upload_file(arguments["path"])
    return {"file": [url, *digest(url)]}


async def large_async(arguments):
    """The same with the client's asynchronous half."""
    url = await fal_client.upload_file_async(arguments["path"])
    return {"file": [url, *digest(url)]}


def repository(arguments):
    """upload_image by way of fal's older storage, and an upscale of what is there."""
    return by_storage(arguments, repository="fal")


def broken(arguments):
    """The same, chosen by the client because the first way to upload does not work."""
    fal_client.client.CDN_URL = "https://v3.fal.media/nowhere"
    return by_storage(arguments)


def by_storage(arguments, **options):
    """Where a picture ended up, whether it is the one that was sent, and its upscale."""
    image, expected = picture(arguments["picture"])
    url = fal_client.upload_image(image, format="png", **options)
    return {
        "image": [url, *digest(url), expected],
        "result": fal_client.run(ENDPOINT, arguments={**arguments["input"], "image_url": url}),
    }


VERBS = {"small": small, "large": large, "repository": repository, "broken": broken}


if __name__ == "__main__":
    verb, text = sys.argv[1:]
    work = json.loads(text)
    answer = asyncio.run(large_async(work)) if verb == "large_async" else VERBS[verb](work)
    sys.stdout.write(json.dumps(answer))
