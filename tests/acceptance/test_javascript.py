"""fal's JavaScript client, unmodified, works against this server over plain HTTP, however it is pointed here."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from PIL import Image

from tests.acceptance.javascript.programs import Answer, Program, file, running
from tests.acceptance.live import LiveServer

ENDPOINT = "fal-ai/creative-upscaler"
Arguments = Callable[..., dict[str, Any]]
Perform = Callable[..., Answer]

every_client = pytest.mark.parametrize("client", ["proxy", "middleware", "fetch"])


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """A Node program with fal's client."""
    with running(tmp_path_factory.mktemp("node") / "node.log", "node") as program:
        yield program


@pytest.fixture
def perform(node: Program, paced: LiveServer) -> Perform:
    """Do a verb with a client that is pointed at the server, through its proxy route unless told otherwise."""

    def ask(verb: str, *, client: str = "proxy", **options: Any) -> Answer:
        return node.perform(verb, client=client, base=paced.url, credentials="of-no-account", **options)

    return ask


@pytest.fixture
def long(arguments: Arguments) -> dict[str, Any]:
    """The input of a request that takes seconds."""
    return arguments(creativity=1, num_inference_steps=200, scale=4)


def check_output(output: dict[str, Any], server: LiveServer) -> None:
    """The output is fal's, and its URL gives the picture to anybody."""
    image = output["image"]
    assert (image["width"], image["height"], image["content_type"], output["seed"]) == (128, 96, "image/png", 1)
    data = server.http.get(image["url"]).content
    assert image["url"].startswith(f"{server.url}/files/")
    assert len(data) == image["file_size"]
    assert Image.open(io.BytesIO(data)).size == (128, 96)


def messages(update: dict[str, Any]) -> list[str]:
    """The log of an update."""
    return [line["message"] for line in update["logs"] or ()]


@every_client
def test_run(client: str, perform: Perform, paced: LiveServer, arguments: Arguments) -> None:
    """`run` answers with the picture and the request's id, in one call to this machine."""
    answer = perform("run", client=client, input=arguments())

    assert answer.error is None
    check_output(answer.value["data"], paced)
    assert len(answer.value["requestId"]) == 36
    assert [(call["method"], call["url"].startswith(paced.url)) for call in answer.calls] == [("POST", True)]


@every_client
@pytest.mark.parametrize("mode", ["polling", "streaming"])
def test_subscribe(client: str, mode: str, perform: Perform, paced: LiveServer, arguments: Arguments) -> None:
    """`subscribe` tells the id, then states and log lines as they come, then the picture; it finds every URL here."""
    answer = perform(
        "subscribe",
        client=client,
        input=arguments(num_inference_steps=20),
        mode=mode,
        logs=True,
        **({"pollInterval": 50} if mode == "polling" else {}),
    )

    assert answer.error is None
    updates = answer.notes["updates"]
    check_output(answer.value["data"], paced)
    assert answer.notes["ids"] == [answer.value["requestId"]]
    assert {update["status"] for update in updates} <= {"IN_QUEUE", "IN_PROGRESS", "COMPLETED"}
    assert updates[-1]["status"] == "COMPLETED" and updates[-1]["metrics"]["inference_time"] > 0
    assert all(update["request_id"] == answer.value["requestId"] for update in updates)
    assert any("denoise" in line for line in messages(updates[-1]))
    assert all(call["url"].startswith(paced.url) for call in answer.calls)


def test_a_streaming_subscription_tells_every_log_line_once(
    perform: Perform, paced: LiveServer, arguments: Arguments
) -> None:
    """Events carry only new lines: what the client gathers from them grows to the log that polling gives."""
    answer = perform("subscribe", input=arguments(num_inference_steps=60), mode="streaming", logs=True)

    logs = [update["logs"] for update in answer.notes["updates"]]
    status = paced.get(f"/queue/{ENDPOINT}/requests/{answer.value['requestId']}/status?logs=1").json()
    assert logs[-1] == status["logs"]
    assert all(earlier == later[: len(earlier)] for earlier, later in zip(logs, logs[1:], strict=False))
    assert len({len(lines) for lines in logs}) >= 3, "the lines come while they are written"
    assert [urlsplit(call["target"]).path.rsplit("/", 1)[-1] for call in answer.calls].count("stream") == 1


@every_client
def test_cancel_while_it_runs(client: str, perform: Perform, paced: LiveServer, long: dict[str, Any]) -> None:
    """The subscription of a request that is cancelled ends soon, with fal's error, after one call for the result."""
    answer = perform("subscribe", client=client, input=long, mode="streaming", logs=True, cancelAt=4)

    assert answer.error is not None
    assert (answer.error["status"], answer.error["body"]["error_type"]) == (499, "client_cancelled")
    assert answer.error["requestId"] == answer.notes["ids"][0]
    last = answer.notes["updates"][-1]
    assert (last["status"], last["error_type"]) == ("COMPLETED", "client_cancelled")
    assert [(call["method"], call["status"]) for call in answer.calls if call["method"] == "PUT"] == [("PUT", 202)]
    assert not any(call["body"] for call in answer.calls if call["method"] == "PUT"), "JSON by its type, but empty"
    assert answer.calls[-1]["status"] == 499


def test_cancel_while_it_waits(perform: Perform, paced: LiveServer, arguments: Arguments, long: dict[str, Any]) -> None:
    """A request cancelled in the queue never runs, is over at once, and those behind it move up."""
    with paced.occupied(ENDPOINT, long):
        first = perform("submit", input=arguments()).value
        second = perform("submit", input=arguments()).value
        before = perform("status", requestId=second["request_id"]).value
        answer = perform("cancel", requestId=first["request_id"])
        cancelled = perform("status", requestId=first["request_id"], logs=True).value
        result = perform("result", requestId=first["request_id"])
        after = perform("status", requestId=second["request_id"]).value
        perform("cancel", requestId=second["request_id"])

    assert [call["status"] for call in answer.calls] == [200]
    assert (cancelled["status"], cancelled["error_type"]) == ("COMPLETED", "client_cancelled")
    assert not any("denoise" in line for line in messages(cancelled))
    assert result.error is not None and result.error["status"] == 499
    assert after["queue_position"] == before["queue_position"] - 1


def test_cancel_when_it_is_over(perform: Perform, arguments: Arguments) -> None:
    """It is too late: an error at once, and only one call."""
    request_id = perform("subscribe", input=arguments(), pollInterval=50).value["requestId"]

    answer = perform("cancel", requestId=request_id)

    assert answer.error is not None
    assert (answer.error["name"], answer.error["status"]) == ("ApiError", 400)
    assert answer.error["body"]["status"] == "ALREADY_COMPLETED"
    assert len(answer.calls) == 1


def test_logs_are_null_unless_asked_for(perform: Perform, paced: LiveServer, long: dict[str, Any]) -> None:
    """A status has the key `logs` in every state, and nothing in it without `logs: true`."""
    with paced.occupied(ENDPOINT, long) as accepted:
        running = perform("status", requestId=accepted[0]["request_id"], logs=False).value
        waiting = perform("status", requestId=accepted[1]["request_id"], logs=False).value
    done = perform("status", requestId=accepted[0]["request_id"], logs=False).value

    assert [body["status"] for body in (waiting, running, done)] == ["IN_QUEUE", "IN_PROGRESS", "COMPLETED"]
    assert all("logs" in body and body["logs"] is None for body in (waiting, running, done))


def test_a_result_that_is_not_there_yet(perform: Perform, paced: LiveServer, long: dict[str, Any]) -> None:
    """Asking too early is an error at once, never repeated by the client."""
    with paced.occupied(ENDPOINT, long) as accepted:
        answers = [perform("result", requestId=row["request_id"]) for row in accepted[:2]]

    for answer, row in zip(answers, accepted, strict=False):
        assert answer.error is not None
        assert (answer.error["name"], answer.error["status"]) == ("ApiError", 400)
        assert answer.error["requestId"] == row["request_id"]
        assert len(answer.calls) == 1 and answer.seconds < 1.0


@pytest.mark.parametrize("verb", ["status", "result", "cancel"])
def test_an_unknown_request(verb: str, perform: Perform) -> None:
    """404, in less than a second: no storm of retries."""
    answer = perform(verb, requestId="7f1b4c57-0f0e-4f0e-9e53-0a4c4a3d8f11")

    assert answer.error is not None
    assert (answer.error["name"], answer.error["status"]) == ("ApiError", 404)
    assert answer.error["body"]["detail"] == "Request not found"
    assert len(answer.calls) == 1 and answer.seconds < 1.0


def test_a_model_error(perform: Perform, arguments: Arguments) -> None:
    """A picture that cannot be read is the client's ValidationError, which finds the field."""
    broken = "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n and no more").decode()

    answer = perform("subscribe", input=arguments(image_url=broken), pollInterval=50)

    assert answer.error is not None
    assert (answer.error["name"], answer.error["status"]) == ("ValidationError", 422)
    (item,) = answer.error["imageErrors"]
    assert item["type"] == "image_load_error"
    assert answer.error["requestId"] == answer.notes["ids"][0]
    last = answer.notes["updates"][-1]
    assert (last["status"], last["error_type"]) == ("COMPLETED", "image_load_error")
    assert [call["status"] for call in answer.calls].count(422) == 1


def test_an_input_that_does_not_fit(perform: Perform, arguments: Arguments) -> None:
    """The queue accepts it and answers 422 as its result, as fal does; `run` answers 422 at once."""
    accepted = perform("submit", input=arguments(scale=9))
    result = perform("result", requestId=accepted.value["request_id"])
    run = perform("run", input=arguments(scale=9))

    assert (accepted.error, accepted.value["status"], accepted.calls[0]["status"]) == (None, "IN_QUEUE", 200)
    for answer in (result, run):
        assert answer.error is not None and answer.error["name"] == "ValidationError"
        (item,) = answer.error["fieldErrors"]
        assert (item["type"], item["loc"]) == ("less_than_equal", ["body", "scale"])
        assert [call["status"] for call in answer.calls] == [422]


def test_no_input_at_all(perform: Perform) -> None:
    """A body that is JSON by its type and empty counts as `{}`: what is missing is the picture."""
    answer = perform("run")

    assert answer.calls[0]["body"] is None
    assert answer.error is not None and answer.error["status"] == 422
    assert [(item["type"], item["loc"]) for item in answer.error["fieldErrors"]] == [("missing", ["body", "image_url"])]


def test_run_by_get(perform: Perform) -> None:
    """These endpoints are called by POST; any other method is refused in JSON, once."""
    answer = perform("run", method="get", input={"prompt": "people"})

    assert answer.error is not None
    assert (answer.error["name"], answer.error["status"]) == ("ApiError", 405)
    assert answer.error["body"]["detail"] == "Method Not Allowed"
    assert len(answer.calls) == 1


def test_the_client_gives_up(perform: Perform, paced: LiveServer, long: dict[str, Any]) -> None:
    """With `timeout` the client stops waiting, and cancels what it no longer wants."""
    answer = perform("subscribe", input=long, timeout=700, pollInterval=100)

    (request_id,) = answer.notes["ids"]
    status = paced.wait_for_end(f"{paced.url}/queue/{ENDPOINT}/requests/{request_id}/status")
    assert answer.error is not None and "timed out waiting" in answer.error["message"]
    assert 0.7 <= answer.seconds < 5.0
    assert status["error_type"] == "client_cancelled"


def test_a_start_timeout(perform: Perform, paced: LiveServer, arguments: Arguments, long: dict[str, Any]) -> None:
    """What cannot start in time is a 504 that the client knows for the user's own wish and does not repeat."""
    with paced.occupied(ENDPOINT, long):
        queued = perform("subscribe", input=arguments(), startTimeout=1.2, pollInterval=50)
        run = perform("run", input=arguments(), startTimeout=1.2)

    for answer in (queued, run):
        assert answer.error is not None
        assert (answer.error["status"], answer.error["timeoutType"]) == (504, "user")
        assert answer.error["isUserTimeout"]
        assert [call["status"] for call in answer.calls].count(504) == 1
    last = queued.notes["updates"][-1]
    assert (last["status"], last["error_type"]) == ("COMPLETED", "request_timeout")
    assert len(run.calls) == 1


def test_a_start_timeout_that_was_kept(perform: Perform, arguments: Arguments) -> None:
    """What did start in time may take as long as it takes."""
    answer = perform("subscribe", input=arguments(num_inference_steps=30), startTimeout=1.2, pollInterval=50)

    assert answer.error is None
    assert answer.seconds > 1.2


def test_a_crash_of_the_model(perform: Perform, arguments: Arguments) -> None:
    """A fault of ours is a 500 without particulars, with its id, and the client asks once."""
    answer = perform("run", input=arguments(prompt="broken code"))

    assert answer.error is not None
    assert (answer.error["name"], answer.error["status"]) == ("ApiError", 500)
    assert answer.error["body"]["detail"][0]["type"] == "internal_server_error"
    assert len(answer.error["requestId"]) == 36
    assert len(answer.calls) == 1


@every_client
def test_upload(client: str, perform: Perform, paced: LiveServer, picture: bytes, arguments: Arguments) -> None:
    """An uploaded file is served as it was, and is the input of a request by its URL."""
    answer = perform("upload", client=client, file=file(picture, name="people.png", type="image/png"))

    assert answer.error is None
    url = answer.value["url"]
    served = paced.http.get(url)
    assert (served.content, served.headers["content-type"]) == (picture, "image/png")
    assert url.startswith(f"{paced.url}/files/") and url.endswith("people.png")
    assert all(call["url"].startswith(paced.url) for call in answer.calls)
    check_output(perform("run", client=client, input=arguments(image_url=url)).value["data"], paced)


def test_upload_of_a_blob_without_a_type(perform: Perform, paced: LiveServer) -> None:
    """It is bytes, and its name says so."""
    answer = perform("upload", file=file(b"anything"))

    assert answer.error is None
    served = paced.http.get(answer.value["url"])
    assert (served.content, served.headers["content-type"]) == (b"anything", "application/octet-stream")
    assert answer.value["url"].endswith(".octet")


def test_upload_in_parts(perform: Perform, paced: LiveServer) -> None:
    """101 MB go in ten parts, one after the other, and come back as they were."""
    answer = perform("upload", file=file(101_000_000, name="large.bin", type="application/octet-stream"))

    assert answer.error is None
    initiate, *parts, complete = answer.calls
    assert "/storage/upload/initiate-multipart" in initiate["target"]
    assert [(call["method"], call["status"]) for call in parts] == [("PUT", 200)] * 10
    assert [urlsplit(call["url"]).path.rsplit("/", 1)[-1] for call in parts] == [str(n) for n in range(1, 11)]
    assert len({urlsplit(call["url"]).query for call in (*parts, complete)}) == 1
    assert [part["partNumber"] for part in json.loads(complete["body"])["parts"]] == list(range(1, 11))
    digest = hashlib.sha256()
    with paced.http.stream("GET", answer.value["url"]) as served:
        for chunk in served.iter_bytes():
            digest.update(chunk)
    assert digest.hexdigest() == answer.value["sha256"]


def test_files_live_as_long_as_the_client_says(
    perform: Perform, paced: LiveServer, picture: bytes, arguments: Arguments
) -> None:
    """`expiresIn` holds for an upload, and apart from it for the pictures of a request; readers are not restricted."""
    wish = {"expiresIn": 3600, "initialAcl": {"default": "hide"}}

    upload = perform("upload", file=file(picture, name="a.png", type="image/png"), lifecycle=wish)
    run = perform("run", input=arguments(), storageSettings={"expiresIn": 7200})

    lives = []
    for url in (upload.value["url"], run.value["data"]["image"]["url"]):
        with contextlib.closing(sqlite3.connect(paced.data / "ledger.sqlite3")) as ledger:
            key = urlsplit(url).path.removeprefix("/files/")
            lives += ledger.execute("SELECT expires FROM blobs WHERE key = ?", [key]).fetchall()
        assert paced.http.get(url).status_code == 200
    assert [round((expires - time.time()) / 3600) for (expires,) in lives] == [1, 2]


def test_a_request_of_low_priority_waits_for_the_others(
    perform: Perform, paced: LiveServer, arguments: Arguments, long: dict[str, Any]
) -> None:
    """Those of normal priority go before it, also when they come later."""
    with paced.occupied(ENDPOINT, long):
        low = perform("submit", input=arguments(), priority="low").value
        before = perform("status", requestId=low["request_id"]).value
        normal = perform("submit", input=arguments(), priority="normal").value
        places = [perform("status", requestId=row["request_id"]).value for row in (low, normal)]
        for row in (low, normal):
            perform("cancel", requestId=row["request_id"])

    assert [status["queue_position"] for status in (before, *places)] == [2, 3, 2]


def test_files_inside_the_input(perform: Perform, paced: LiveServer, picture: bytes, arguments: Arguments) -> None:
    """The client uploads files wherever they are in the input and sends their URLs; a data URI it sends as it is."""
    image = file(picture, name="people.png", type="image/png")

    nested = perform("run", input=arguments(more=[{"file": image}]))
    direct = perform("run", input=arguments(image_url=image))

    body = json.loads(nested.calls[-1]["body"])
    assert body["image_url"] == arguments()["image_url"]
    assert paced.http.get(body["more"][0]["file"]).content == picture
    for answer in (nested, direct):
        assert answer.error is None
        check_output(answer.value["data"], paced)


@pytest.mark.parametrize("mode", ["server", "client"])
def test_stream(mode: str, perform: Perform, paced: LiveServer, arguments: Arguments) -> None:
    """A stream tells the progress of the model; its last event is the output. A token from here opens it as well."""
    answer = perform("stream", client="fetch", connectionMode=mode, input=arguments(num_inference_steps=20))

    assert answer.error is None
    assert len(answer.notes["events"]) >= 3
    assert answer.notes["events"][-1] == answer.value
    assert len(answer.notes["requestId"]) == 36
    check_output(answer.value, paced)


def test_the_official_proxy_in_front(
    tmp_path_factory: pytest.TempPathFactory, paced: LiveServer, arguments: Arguments
) -> None:
    """Through fal's own proxy under Express the client works too: what it leaves in `x-fal-target-url` is ignored."""
    with running(tmp_path_factory.mktemp("chained") / "node.log", "chained", paced.url) as program:
        answers = [
            program.perform("run", client="chained", base=paced.url, input=arguments()),
            program.perform("subscribe", client="chained", base=paced.url, input=arguments(), pollInterval=50),
            program.perform("subscribe", client="chained", base=paced.url, input=arguments(), mode="streaming"),
        ]

    for answer in answers:
        assert answer.error is None
        assert len(answer.value["requestId"]) == 36
        check_output(answer.value["data"], paced)
        assert {call["status"] for call in answer.calls} <= {200, 202}
        assert all(call["target"].startswith(paced.url) for call in answer.calls), "the proxy's own calls carry it too"
        assert len([call for call in answer.calls if call["url"].startswith(paced.url)]) == len(answer.calls) / 2


@pytest.mark.parametrize(
    ("method", "target", "status"),
    [
        ("POST", None, 400),
        ("POST", "not a URL", 400),
        ("GET", "http://169.254.169.254/latest/meta-data/", 400),
        ("POST", "http://127.0.0.1:{listener}/run/fal-ai/creative-upscaler", 400),
        ("POST", "https://fal.run@127.0.0.1:{listener}/", 400),
        ("DELETE", "https://fal.run/fal-ai/creative-upscaler", 405),
    ],
)
def test_the_proxy_route_never_fetches(method: str, target: str | None, status: int, paced: LiveServer) -> None:
    """Targets that are missing, malformed or somebody else's are refused, and nobody is called."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        headers = {"x-fal-target-url": target.format(listener=listener.getsockname()[1])} if target else {}

        answer = paced.http.request(method, f"{paced.url}/api/fal/proxy", headers=headers)

        assert answer.status_code == status
        assert answer.json()["detail"]
        with pytest.raises(TimeoutError):
            listener.accept()
