"""The README's recipes, taken from it and followed to the letter; only addresses and files are the test's own."""

from __future__ import annotations

import json
import os
import re
import shlex
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml
from PIL import Image

from server.settings import Settings
from tests.acceptance import nginx
from tests.acceptance.clients import confined
from tests.acceptance.conftest import PHOTO
from tests.acceptance.javascript.programs import INSTALLED, chromium
from tests.acceptance.javascript.programs import installed as installed_node
from tests.acceptance.live import FAKE, ROOT, LiveServer
from tests.acceptance.ports import reserved_ports
from tests.acceptance.recipes import recipes
from tests.weights import hub_server
from tests.weights.repositories import published
from weights.store import WeightStore

ENDPOINT = "fal-ai/creative-upscaler"
CLARITY = "fal-ai/clarity-upscaler"
KEY = "of-the-operator:secret"
VENV = ".venv/bin/"
NGINX = ROOT / "server" / "deploy" / "nginx.conf"
RECIPE_S = 120.0


def compose() -> dict[str, Any]:
    """The services of the compose file."""
    (text,) = recipes("In a Docker network", "yaml")
    services: dict[str, Any] = yaml.safe_load(text)["services"]
    return services


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server with a key, configured as the recipes for Docker and nginx say."""
    told = {name: value.replace("${FAL_KEY}", KEY) for name, value in compose()["upscaler"]["environment"].items()}
    trusted = re.search(r"UPSCALER_TRUSTED_PROXIES=(\S+)", NGINX.read_text())
    assert trusted is not None
    server = LiveServer(
        tmp_path_factory.mktemp("guarded") / "data",
        FAKE,
        FAKE_STEP_S="0.02",
        UPSCALER_TRUSTED_PROXIES=trusted[1],
        **told,
    )
    server.start()
    yield server
    assert server.stop() == 0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a photograph in it, and what npm installed."""
    with Image.open(PHOTO) as photo:
        photo.convert("RGB").crop((420, 200, 484, 248)).save(tmp_path / "photo.jpg")
    (tmp_path / "node_modules").symlink_to(INSTALLED / "node_modules")
    return tmp_path


def follow(script: str, folder: Path, environment: dict[str, str]) -> str:
    """What a shell prints that does this, without installing anything, in an environment that knows our programs."""
    lines = [line for line in script.splitlines() if not line.startswith(("pip ", "npm "))]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(lines)],
        cwd=folder,
        env={"HOME": str(folder), **environment, "PATH": path},
        capture_output=True,
        text=True,
        timeout=RECIPE_S,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_picture(url: str, base: str, server: LiveServer) -> None:
    """The URL is the server's as the client knows it, and leads to the picture."""
    assert url.startswith(f"{base}/files/out/")
    answer = server.get(url.removeprefix(base))
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")


def upscale(folder: Path, environment: dict[str, str]) -> str:
    """The URL that the Python recipe prints, in a process that cannot leave this machine."""
    (program,) = recipes("Python", "python")
    (folder / "upscale.py").write_text(program)
    *updates, url = follow("python upscale.py photo.jpg", folder, confined(environment)).splitlines()
    assert any("Completed" in update for update in updates)
    return url


def test_quick_start(paced: LiveServer, folder: Path) -> None:
    """What `make serve` starts is a client's by one line; one picture needs no server."""
    _, serve, point, once = recipes("Quick start", "sh")
    (program,) = recipes("Python", "python")
    (folder / "my_program_that_uses_fal_client.py").write_text(program)
    dry = [*serve.split(), "--dry-run", "--no-print-directory"]
    planned = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    environment = confined({"UPSCALER_DATA": str(paced.data)})
    point = point.replace(".py ", ".py photo.jpg ")
    once = once.replace("tests/photos/clinic.png", "photo.jpg")

    printed = follow(point.replace(VENV, ""), folder, environment)
    follow(once.replace(VENV, ""), folder, environment)

    assert planned.splitlines()[-1].split() == [f"{VENV}creative-upscaler", "serve"]
    check_picture(printed.splitlines()[-1], f"https://localhost:{paced.tls_port}", paced)
    with Image.open(folder / "big.png") as picture:
        assert picture.size == (96, 72)


@pytest.mark.slow
def test_demo() -> None:
    """The first command of all says what the page shows, numbers aside, and ends with the path of a picture."""
    (demo, *_), (shown,) = recipes("Quick start", "sh"), recipes("Quick start", "text")
    prefix = Path(sys.prefix)
    here = [f"VENV={prefix}", "--assume-old", str(prefix / ".installed-demo"), "--silent"]

    done = subprocess.run([*demo.split(), *here], cwd=ROOT, capture_output=True, text=True, timeout=600)

    assert done.returncode == 0, done.stderr
    said = iter(re.sub(r"\d+", "N", done.stdout).splitlines())
    assert all(line in said for line in re.sub(r"\d+", "N", shown).splitlines() if line.strip() != "…")
    with Image.open(ROOT / done.stdout.splitlines()[-1]) as picture:
        assert max(picture.size) == 1024


def test_python(guarded: LiveServer, folder: Path) -> None:
    """Install, eval, run."""
    (script,), (program,) = recipes("Python", "sh"), recipes("Python", "python")
    (folder / "upscale.py").write_text(program)

    printed = follow(script, folder, confined({"UPSCALER_DATA": str(guarded.data)}))

    check_picture(printed.splitlines()[-1], f"https://localhost:{guarded.tls_port}", guarded)


def test_node(guarded: LiveServer, folder: Path) -> None:
    """Install, eval, run: over HTTPS, the file uploaded by the client."""
    installed_node()
    (script,), (program,) = recipes("Node.js", "sh"), recipes("Node.js", "js")
    (folder / "upscale.mjs").write_text(program)

    *states, url = follow(script, folder, {"UPSCALER_DATA": str(guarded.data)}).splitlines()

    assert states[-1] == "COMPLETED"
    check_picture(url, f"https://localhost:{guarded.tls_port}", guarded)


def test_browser(paced: LiveServer, folder: Path) -> None:
    """A page of another origin upscales a file that a person chose in it."""
    node = installed_node()
    (module,) = recipes("Browser", "js")
    (folder / "upscale.js").write_text(module.replace("HOST:8000", f"127.0.0.1:{paced.port}"))
    command = [node, INSTALLED / "choose.mjs", chromium(), folder, "upscale.js", folder / "photo.jpg"]

    url = follow(shlex.join(map(str, command)), folder, {}).strip()

    check_picture(url, paced.url, paced)


def test_curl(guarded: LiveServer, folder: Path) -> None:
    """Upload, then run with the URL that came back."""
    upload, run = (script.replace("HOST:8000", f"127.0.0.1:{guarded.port}") for script in recipes("curl", "sh"))

    access_url = json.loads(follow(upload, folder, {"FAL_KEY": KEY}))["access_url"]
    result = json.loads(follow(run.replace("ACCESS_URL", access_url), folder, {"FAL_KEY": KEY}))

    assert guarded.http.get(access_url).content == (folder / "photo.jpg").read_bytes()
    check_picture(result["image"]["url"], guarded.url, guarded)


def test_in_a_docker_network(guarded: LiveServer, folder: Path) -> None:
    """By the name of the service, over TLS that the shared folder makes trustworthy, and by its plain port."""
    services = compose()
    (shared,) = services["app"]["volumes"]
    trust = guarded.data / shared["volume"]["subpath"]
    environment = {
        name: value.replace("${FAL_KEY}", KEY)
        .replace(":8443", f":{guarded.tls_port}")
        .replace(":8000", f":{guarded.port}")
        .replace(shared["target"], str(trust))
        for name, value in services["app"]["environment"].items()
    }

    url = upscale(folder, environment)
    host = environment["CREATIVE_UPSCALER_URL"].removeprefix("http://")
    accepted = guarded.http.post(
        f"{guarded.url}/queue/{ENDPOINT}", json={}, headers={"host": host, "authorization": f"Key {KEY}"}
    ).json()

    check_picture(url, f"https://upscaler:{guarded.tls_port}", guarded)
    assert accepted["status_url"].startswith(f"http://{host}/queue/")
    assert not any("key" in path.name for path in trust.iterdir()), "what is shared holds nothing secret"


@pytest.fixture
def behind_nginx(guarded: LiveServer, tmp_path: Path) -> Iterator[httpx2.Client]:
    """A client of the server behind nginx; its base is the address of nginx."""
    (port,) = reserved_ports(1)
    changes = {
        "listen 443 ssl": f"listen 127.0.0.1:{port} ssl",
        "server_name upscaler.example.com": "server_name localhost",
        "/etc/ssl/upscaler.pem": str(guarded.data / "tls" / "server.pem"),
        "/etc/ssl/upscaler-key.pem": str(guarded.data / "tls" / "server-key.pem"),
        "http://127.0.0.1:8000": guarded.url,
    }
    block = NGINX.read_text()
    for documented, ours in changes.items():
        assert documented in block
        block = block.replace(documented, ours)
    trust = ssl.create_default_context(cafile=str(guarded.data / "tls" / "trust" / "ca-bundle.pem"))
    with (
        nginx.serving(block, tmp_path, port),
        httpx2.Client(
            base_url=f"https://localhost:{port}",
            verify=trust,
            trust_env=False,
            timeout=60.0,
            headers={"authorization": f"Key {KEY}"},
        ) as client,
    ):
        yield client


def test_behind_nginx(behind_nginx: httpx2.Client, guarded: LiveServer, folder: Path) -> None:
    """The Python recipe works by the address of nginx, which all URLs carry."""
    base = str(behind_nginx.base_url).rstrip("/")
    host = base.removeprefix("https://")
    environment = guarded.client_environment | {"FAL_RUN_HOST": f"{host}/run", "FAL_QUEUE_RUN_HOST": f"{host}/queue"}

    url = upscale(folder, environment)

    check_picture(url, base, guarded)
    assert behind_nginx.get(url).status_code == 200


def test_uploads_and_streams_go_through_nginx(behind_nginx: httpx2.Client, guarded: LiveServer) -> None:
    """A large file arrives as it was; events come while the request runs, not when it is over."""
    data = os.urandom(20_000_000)
    image_url = behind_nginx.post("/files/upload", content=data).json()["access_url"]
    with Image.open(PHOTO) as photo:
        small = photo.convert("RGB").crop((420, 200, 484, 248))
    small.save(guarded.data / "small.png")
    picture = behind_nginx.post(
        "/files/upload", content=(guarded.data / "small.png").read_bytes(), headers={"content-type": "image/png"}
    ).json()["access_url"]
    accepted = behind_nginx.post(f"/queue/{ENDPOINT}", json={"image_url": picture, "num_inference_steps": 100}).json()
    with behind_nginx.stream("GET", f"{accepted['status_url']}/stream?logs=1") as stream:
        lines = stream.iter_lines()
        next(line for line in lines if "denoise" in line)
        while_reading = behind_nginx.get(accepted["status_url"]).json()["status"]
        events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]

    assert behind_nginx.get(image_url).content == data
    assert while_reading == "IN_PROGRESS" and events[-1]["status"] == "COMPLETED"


def test_without_one_changed_line(paced: LiveServer, folder: Path) -> None:
    """Under fal's own names: what `env --fal-proxy` prints is all that the recipe needs."""
    (program,), (script,) = recipes("Python", "python"), recipes("Without one changed line", "sh")
    (folder / "upscale.py").write_text(program)
    serve, point = script.splitlines()

    printed = follow(f"{point}\npython upscale.py photo.jpg", folder, confined({"UPSCALER_DATA": str(paced.data)}))

    assert serve == "creative-upscaler serve --fal-proxy 8444"
    check_picture(printed.splitlines()[-1], "https://queue.fal.run", paced)


def test_the_full_set(folder: Path) -> None:
    """A set is pulled, verified, carried to another server and imported there; the hub has small files."""
    (script,) = recipes("The full set", "sh")
    lines = script.replace(ENDPOINT, CLARITY).replace("/media/usb", str(folder / "usb")).splitlines()
    with hub_server.serving(published()) as hub:
        environment = {"HF_ENDPOINT": hub.url, "UPSCALER_DATA": str(folder / "data")}
        listed = follow("\n".join(lines[:3]), folder, environment)
    (folder / "data/weights/full").rename(folder / "usb")
    follow("\n".join(lines[3:]), folder, environment)

    assert "controlnet-tile-sd15" in listed
    assert WeightStore("full", folder / "data/weights/full").missing(CLARITY, "flux2-klein-4b") == []


def test_deployment_with_compose() -> None:
    """What is said to Docker fits the compose file, and what is run in the container is a command of ours."""
    (script,) = recipes("Deployment", "sh")
    exports, *lines = script.splitlines()
    given = dict(word.split("=", 1) for word in shlex.split(exports)[1:])
    project = yaml.safe_load((ROOT / given["COMPOSE_FILE"]).read_text())
    profile = given["COMPOSE_PROFILES"]
    run, up, copy = (shlex.split(line, comments=True)[2:] for line in lines)

    assert project["services"][profile]["profiles"] == [profile]
    assert f"${{{list(given)[-1]}:?" in project["x-server"]["environment"][list(given)[-1]]
    assert run[:4] == ["run", "--rm", profile, "creative-upscaler"] and up == ["up", "--detach", "--wait"]
    assert (
        subprocess.run([sys.executable, "-m", "server", *run[4:], "--help"], cwd=ROOT, capture_output=True).returncode
        == 0
    )
    (folder,) = re.findall(r":(/\S+)", project["x-server"]["volumes"][0])
    assert copy == ["cp", f"{profile}:{Settings(data=Path(folder)).trust_dir}", "trust"]
