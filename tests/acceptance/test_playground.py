"""The playground in a real browser: everything a person can do there, against a live server."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from server.endpoints import ENDPOINTS
from tests.acceptance.javascript.programs import INSTALLED, Answer, Program, chromium, installed, running
from tests.acceptance.live import FAKE, LiveServer

MAX_PAGE_BYTES = 100_000
FIELD = '[data-name="{}"]'
BESIDE = (
    "document.querySelector('#comparison').dataset.state === 'pair' && document.querySelector('.tag.right').textContent"
)
PAIR, PREVIEWED = f"({BESIDE}) === 'After'", f"({BESIDE}) === 'Preview'"
SINGLE = "document.querySelector('#comparison').dataset.state === 'single'"


class Tab:
    """A browser's tab with the playground of one server."""

    def __init__(self, program: Program, server: LiveServer) -> None:
        self._program, self.server = program, server

    def do(self, verb: str, **options: Any) -> Answer:
        """One action, which has to succeed."""
        answer = self._program.perform(verb, client="playground", base=self.server.url, **options)
        assert answer.error is None, (verb, options.get("selector") or options.get("expression"), answer.error)
        return answer

    def open(self, **options: Any) -> Tab:
        """The page in a new browser profile."""
        self.do("open", **options)
        return self

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        return self.do("ask", expression=expression).value

    def text(self, selector: str) -> str:
        """The text of an element."""
        return str(self.ask(f"document.querySelector({json.dumps(selector)}).textContent"))

    def wait(self, expression: str) -> None:
        """Until an expression is true."""
        self.do("until", expression=expression)

    def wait_for_phase(self, beginning: str) -> None:
        """Until the page says so of its request."""
        self.wait(f"document.querySelector('#phase').textContent.startsWith({json.dumps(beginning)})")

    def drop(self, picture: bytes, *, event: str = "drop", name: str = "people.png", type: str = "image/png") -> None:
        """Let go of a file over the page, or paste it."""
        self.do("hand", event=event, name=name, type=type, base64=base64.b64encode(picture).decode())

    def set(self, name: str, value: object) -> None:
        """Type a parameter's value."""
        self.do("fill", selector=f"#field-{name}", value=str(value))

    def run(self) -> None:
        """Press the button."""
        self.do("click", selector="#run")

    @property
    def console(self) -> list[str]:
        """Errors and warnings so far."""
        lines: list[str] = self.do("ask", expression="0").notes["console"]
        return lines


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """A browser."""
    with running(tmp_path_factory.mktemp("playground") / "node.log", "playground", chromium()) as program:
        yield program


@pytest.fixture
def tab(program: Program, paced: LiveServer) -> Tab:
    """The playground of a server whose steps take 50 ms."""
    return Tab(program, paced).open()


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server that asks for a key, and may be hurt."""
    data = tmp_path_factory.mktemp("locked") / "data"
    server = LiveServer(data, FAKE, FAKE_STEP_S="0.05", UPSCALER_API_KEYS='["the:secret"]')
    server.start()
    yield server
    assert server.stop() == 0


def test_from_a_picture_to_a_larger_one(tab: Tab, picture: bytes) -> None:
    """Drop, change parameters, run, follow the steps, compare, download; nothing is asked of another host."""
    tab.drop(picture)
    tab.wait(SINGLE)
    tab.set("scale", 3)
    tab.set("num_inference_steps", 40)
    tab.do("click", selector="#fields summary")
    tab.set("seed", 7)
    tab.run()
    tab.wait_for_phase("Denoise")
    tab.wait("document.querySelector('#bar').value > 0")
    maximum, log = tab.ask("document.querySelector('#bar').max"), tab.text("#log")
    tab.wait(PAIR)
    download = tab.do("download", selector="#download")

    with Image.open(io.BytesIO(base64.b64decode(download.value["base64"]))) as upscaled:
        assert (upscaled.format, upscaled.size) == ("PNG", (192, 144))
    assert download.value["name"].endswith(".png")
    assert maximum == 40 and "denoise " in log
    assert tab.text("#caption").startswith("192 × 144 px")
    assert "Seed7" in tab.text("#facts") and "pocket weights" in tab.text("#facts")
    assert "denoise 40/40" in tab.text("#log") and tab.text("#phase").startswith("Done in")
    assert all(f" {tab.server.url}/" in request or " blob:" in request for request in download.notes["requests"])
    assert tab.console == []


@pytest.mark.parametrize("endpoint", list(ENDPOINTS))
def test_every_parameter_has_its_control(endpoint: str, tab: Tab) -> None:
    """The controls are those of the endpoint's document: names, defaults, ranges, options and descriptions."""
    url = f"{tab.server.url}/api/openapi/queue/openapi.json"
    document = tab.server.http.get(url, params={"endpoint_id": endpoint}).json()
    place = document["paths"][f"/{endpoint}"]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    properties = document["components"]["schemas"][place.rpartition("/")[2]]["properties"]

    tab.do("choose", selector="#endpoint", value=endpoint)
    tab.wait(f"document.querySelector('#endpoint-help').textContent === {json.dumps(ENDPOINTS[endpoint].description)}")

    shown = tab.ask("[...document.querySelectorAll('[data-name]')].map((field) => field.dataset.name)")
    assert sorted(shown) == sorted(properties)
    for name, schema in properties.items():
        control = tab.ask(
            f"(() => {{ const field = document.querySelector('{FIELD.format(name)}');"
            "const all = [...field.querySelectorAll('input, select, textarea')].filter((one) => one.type !== 'range');"
            "const one = all.find((input) => input.checked) ?? all[0];"
            "return {label: field.querySelector('label, .title').textContent, help: field.querySelector('.help')"
            ".textContent, value: one.type === 'checkbox' ? one.checked : one.value, min: one.min, max: one.max, "
            "texts: [...field.querySelectorAll('.segments span, option')].map((option) => option.textContent)}; })()"
        )
        assert control["label"].lower().replace(" ", "_") == name
        assert " ".join(schema.get("description", "").split()) in control["help"]
        assert control["texts"] == [str(option) for option in schema.get("enum", [])]
        if "enum" not in schema:
            default = schema.get("default", "")
            assert control["value"] == (default if isinstance(default, bool) else str(default))
        if "minimum" in schema:
            assert (control["min"], control["max"]) == (str(schema["minimum"]), str(schema["maximum"]))
    assert tab.console == []


def test_paste_and_choose(tab: Tab, picture: bytes) -> None:
    """A picture comes from the clipboard or from the file dialog as well."""
    tab.drop(picture, event="paste", name="pasted.png")
    tab.wait(SINGLE)
    pasted = tab.text(".file")
    tab.do("click", selector=".file button")
    tab.wait("document.querySelector('#comparison').dataset.state === 'empty'")
    tab.do("pick", selector="#file", name="chosen.png", type="image/png", base64=base64.b64encode(picture).decode())
    tab.wait(SINGLE)

    assert pasted.startswith("pasted.png") and tab.text(".file").startswith("chosen.png")
    assert tab.console == []


def test_the_divider_and_the_zoom(tab: Tab, picture: bytes) -> None:
    """Divider and view follow keys and pointer."""
    divider = "parseFloat(getComputedStyle(document.querySelector('#comparison')).getPropertyValue('--at'))"
    width = "document.querySelector('.after img').getBoundingClientRect().width"
    box = "(({left, top, width, height}) => [left, top, width, height])"
    box += "(document.querySelector('#comparison').getBoundingClientRect())"
    tab.drop(picture)
    tab.run()
    tab.wait(PAIR)
    left, top, wide, high = tab.ask(box)

    places = [tab.ask(divider)]
    tab.do("focus", selector=".split")
    tab.do("press", keys=["ArrowLeft"] * 8)
    places.append(tab.ask(divider))
    middle = top + high / 2
    tab.do("drag", **{"from": [left + places[1], middle], "to": [left + wide * 0.6, middle]})
    places.append(tab.ask(divider))
    widths = [tab.ask(width)]
    tab.do("focus", selector=".view")
    for keys in (["+", "+"], ["1"], ["-"], ["0"]):
        tab.do("press", keys=keys)
        widths.append(tab.ask(width))
    tab.do("wheel", at=[left + wide / 2, middle], by=-400)
    widths.append(tab.ask(width))

    assert places[1] < places[0] < places[2] and abs(places[2] - wide * 0.6) < 2
    assert widths[1] == pytest.approx(widths[0] * 2.25)
    assert widths[2] == 128  # a pixel for a pixel
    assert widths[3] == 128  # as small as it gets
    assert widths[4] == widths[0] < widths[5]
    assert tab.console == []


def test_cancel(tab: Tab, picture: bytes) -> None:
    """A running request stops, the page says so, and the next one can be made."""
    tab.drop(picture)
    tab.set("num_inference_steps", 200)
    tab.run()
    tab.wait_for_phase("Denoise")
    tab.do("click", selector="#cancel")
    tab.wait_for_phase("Cancelled")
    is_usable = tab.ask("!document.querySelector('#run').disabled && document.querySelector('#cancel').hidden")
    tab.set("num_inference_steps", 2)
    tab.run()
    tab.wait(PAIR)

    assert is_usable
    assert "cancelled" in tab.text("#requests li:nth-child(2)")


def test_errors_are_shown_where_they_belong(tab: Tab, picture: bytes) -> None:
    """The server's faults at their fields, folded ones included; the page's own before anything is sent."""
    tab.run()
    without_picture = tab.text(FIELD.format("image_url") + " .fault")
    tab.drop(picture)
    tab.do("click", selector="#fields summary")
    tab.set("scale", 9)
    tab.set("seed", -3)
    tab.do("click", selector="#fields summary")
    tab.run()
    tab.wait_for_phase("Failed")
    faults = {name: tab.text(FIELD.format(name) + " .fault") for name in ("scale", "seed", "creativity", "image_url")}
    focused = tab.ask("document.activeElement.id")
    is_unfolded = tab.ask("document.querySelector('#fields details').open")
    tab.set("scale", 2)

    assert without_picture == "Choose a picture, or give its address."
    assert faults["scale"] == "Input should be less than or equal to 5"
    assert faults["seed"] == "Input should be greater than or equal to 0"
    assert faults["creativity"] == faults["image_url"] == ""
    assert focused == "field-scale" and is_unfolded
    assert tab.text("#run-fault") == "2 parameters need other values."
    assert tab.text(FIELD.format("scale") + " .fault") == ""
    assert [line for line in tab.console if "422" not in line] == []  # the browser notes the refused request


def test_a_file_that_is_no_picture(tab: Tab) -> None:
    """What the server finds out when it reads the file is shown at the picture."""
    tab.drop(b"not a picture", name="broken.png")
    tab.run()
    tab.wait_for_phase("Failed")

    assert tab.text(FIELD.format("image_url") + " .fault").startswith("Failed to load the image")


def test_history_survives_a_reload(tab: Tab, picture: bytes) -> None:
    """A running request is found again and watched to its end; a finished one is shown with its parameters."""
    tab.drop(picture, name="<b>people</b>.png")
    tab.set("creativity", 0.25)
    tab.set("num_inference_steps", 60)
    tab.run()
    tab.wait_for_phase("Denoise")
    tab.do("reload")
    tab.wait(PAIR)
    tab.do("reload")
    tab.do("click", selector=".entry")
    tab.wait(PAIR)

    assert tab.ask("document.querySelector('#field-creativity').value") == "0.25"
    assert tab.text(".entry .words").startswith("<b>people</b>.png")  # text, never markup
    assert "128 × 96 px" in tab.text(".entry")
    tab.do("click", selector=".forget")
    assert tab.ask("document.querySelectorAll('.entry').length") == 0
    assert tab.console == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (360, 740)])
def test_everybody_can_use_it(
    width: int, height: int, scheme: str, program: Program, paced: LiveServer, picture: bytes
) -> None:
    """Empty, with faults and with a result: contrast, names, targets, and nothing wider than the screen."""
    tab = Tab(program, paced).open(width=width, height=height, scheme=scheme, phone=width < 600)
    findings = {"empty": tab.do("audit").value}
    tab.do("click", selector="#fields summary")
    tab.run()
    findings["fault"] = tab.do("audit").value
    tab.drop(picture)
    tab.set("num_inference_steps", 30)
    tab.run()
    tab.wait_for_phase("Denoise")
    findings["running"] = tab.do("audit").value
    tab.wait(PAIR)
    findings["result"] = tab.do("audit").value

    assert findings == {"empty": [], "fault": [], "running": [], "result": []}


def test_by_keyboard_alone(tab: Tab, picture: bytes) -> None:
    """From the top of the page, Tab reaches every control in order, and Enter in a field runs."""
    tab.drop(picture)
    tab.wait(SINGLE)
    seen = []
    for _ in range(60):
        tab.do("press", keys=["Tab"])
        seen.append(tab.ask("document.activeElement.id || document.activeElement.textContent"))
        if seen[-1] == "copy":
            break
    tab.do("focus", selector="#field-scale")
    tab.do("press", keys=["Enter"])
    tab.wait(PAIR)

    order = [
        "endpoint",
        "field-prompt",
        "field-scale",
        "field-creativity",
        "More parameters",
        "run",
        "reset",
        "tab-curl",
        "copy",
    ]
    assert [name for name in seen if name in order] == order


@pytest.mark.parametrize("language", ["curl", "python", "javascript"])
def test_the_code_does_the_same(language: str, tab: Tab, picture: bytes, tmp_path: Path) -> None:
    """What is copied, run beside the picture in a fresh shell, upscales it with the same parameters."""
    tab.drop(picture, name="it's people.png")
    tab.set("scale", 3)
    tab.set("prompt", 'people\'s "faces" – 100 %\n$HOME \\ `date`')
    tab.do("click", selector=f"#tab-{language}")
    tab.do("click", selector="#copy")
    tab.wait("document.querySelector('#copy').textContent === 'Copied'")
    code = tab.do("ask", expression="navigator.clipboard.readText()").value
    (tmp_path / "it_s people.png").write_bytes(picture)
    commands = {
        "curl": ["sh", "-ec"],
        "python": [sys.executable, "-c"],
        "javascript": [installed(), "--input-type=module", "-e"],
    }
    if language == "javascript":
        (tmp_path / "node_modules").symlink_to(INSTALLED / "node_modules")

    done = subprocess.run(
        [*commands[language], code],
        cwd=tmp_path,
        env=tab.server.client_environment | {"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=60.0,
    )

    assert done.returncode == 0, (code, done.stderr)
    output = done.stdout.replace(" ", "").replace("'", '"').replace('"', "")
    assert "width:192" in output and "height:144" in output, (code, done.stdout)


def test_a_server_with_keys(program: Program, locked: LiveServer, picture: bytes) -> None:
    """The page asks for the key, says when it is wrong, keeps it over a reload, and puts none into the code."""
    tab = Tab(program, locked).open()
    tab.drop(picture)
    tab.do("fill", selector="#key-input", value="another")
    tab.run()
    tab.wait("document.querySelector('#key-fault').textContent !== ''")
    fault = tab.text("#key-fault")
    tab.do("fill", selector="#key-input", value="the:secret")
    tab.do("reload")
    tab.drop(picture)
    tab.run()
    tab.wait(PAIR)
    code = tab.text("#call")

    assert "Invalid key" in fault
    assert "$FAL_KEY" in code and "secret" not in code


def test_the_gateway_dies_in_the_middle(program: Program, locked: LiveServer, picture: bytes) -> None:
    """The page finds its request again and shows what came of it."""
    tab = Tab(program, locked).open()
    tab.do("fill", selector="#key-input", value="the:secret")
    tab.drop(picture)
    tab.set("num_inference_steps", 100)
    tab.run()
    tab.wait_for_phase("Denoise")
    locked.kill("gateway")
    tab.wait(PAIR)

    assert "denoise 100/100" in tab.text("#log") and tab.text("#log").count("decode done") == 1


def test_a_preview_while_it_runs(tab: Tab, picture: bytes) -> None:
    """What there is so far is shown beside the picture, newer and newer; in the end the result is in its place."""
    shown = "document.querySelector('.after img')?.src"
    tab.drop(picture)
    tab.set("num_inference_steps", 100)
    tab.run()
    tab.wait(PREVIEWED)
    first, caption = tab.ask(shown), tab.text("#phase")
    tab.wait(f"{shown} !== {json.dumps(first)}")
    second = tab.ask(shown)
    tab.wait(PAIR)

    assert first.startswith("blob:") and second != first and caption == "Denoise"
    assert "/files/out/" in tab.ask(shown) and tab.text("#caption").startswith("128 × 96 px")
    assert tab.console == []


def test_a_cancelled_request_leaves_no_preview(tab: Tab, picture: bytes) -> None:
    """The picture is alone again."""
    tab.drop(picture)
    tab.set("num_inference_steps", 200)
    tab.run()
    tab.wait(PREVIEWED)
    tab.do("click", selector="#cancel")
    tab.wait_for_phase("Cancelled")
    tab.wait(SINGLE)

    assert tab.console == [] or all("499" in line for line in tab.console)


def test_on_the_pocket_weights(program: Program, server: LiveServer, picture: bytes) -> None:
    """The real pipeline's stages are followed, and before anything is run the page says what it may be expected of."""
    tab = Tab(program, server).open()
    note = tab.text("#weights")
    tab.drop(picture)
    tab.set("num_inference_steps", 4)
    tab.run()
    tab.wait(PAIR)

    assert "Pocket weights are serving." in note and "do not invent faces, fur or lettering" in note
    assert "128 × 96 px" in tab.text("#caption") and "pocket weights" in tab.text("#facts")
    assert tab.console == []


def test_weight_of_the_page(tab: Tab, capsys: pytest.CaptureFixture[str]) -> None:
    """All that the first visit loads is at most 100 KB; the time to the first paint is printed, to be read."""
    tab.open()  # the browser has started by now
    entries = "[...performance.getEntriesByType('resource'), ...performance.getEntriesByType('navigation')]"
    loaded = tab.ask(f"{entries}.reduce((sum, entry) => sum + entry.encodedBodySize, 0)")
    painted = tab.ask("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    usable = tab.ask("performance.getEntriesByName('usable')[0].startTime")

    with capsys.disabled():
        sys.stdout.write(
            f"\nplayground: {loaded} bytes, painted after {painted:.0f} ms, usable after {usable:.0f} ms\n"
        )
    assert 0 < loaded <= MAX_PAGE_BYTES
