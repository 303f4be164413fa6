"""The command line says what it needs, refuses what is unsafe, and hands over every parameter of an endpoint."""

from __future__ import annotations

import io
import shlex
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from server import __main__ as command_line
from server.__main__ import (
    CommandFailed,
    LogStream,
    build_app,
    check_ports,
    client_environment,
    refuse_open_door,
)
from server.demo import exports
from server.settings import Settings, is_loopback
from tests.server.fake_pipeline import PIPELINES

SERVER: dict[str, Any] = {
    "host": "127.0.0.1",
    "port": 8000,
    "tls_port": 8443,
    "public_url": None,
    "trust_dir": "/data/tls/trust",
    "own_ca": True,
    "key": None,
}


def call(*arguments: str, data: Path) -> subprocess.CompletedProcess[str]:
    """Run the program in a process of its own, as a user does."""
    program = [sys.executable, "-m", "server", *arguments, "--data", str(data)]
    return subprocess.run(program, capture_output=True, text=True, timeout=60)


def test_a_client_on_this_machine_is_pointed_at_localhost() -> None:
    """Host, prefixes, a key that fal's client insists on, and the authority behind our certificate."""
    assert client_environment(SERVER) == {
        "FAL_RUN_HOST": "localhost:8443/run",
        "FAL_QUEUE_RUN_HOST": "localhost:8443/queue",
        "FAL_REST_HOST": "localhost:8443/rest",
        "FAL_KEY": "creative-upscaler:no-secret",
        "CREATIVE_UPSCALER_URL": "https://localhost:8443",
        "SSL_CERT_FILE": "/data/tls/trust/ca-bundle.pem",
        "NODE_EXTRA_CA_CERTS": "/data/tls/trust/ca.pem",
    }


@pytest.mark.parametrize(
    ("changes", "host"),
    [
        ({"host": "0.0.0.0"}, "localhost:8443/run"),
        ({"host": "::1"}, "localhost:8443/run"),
        ({"host": "192.168.1.7"}, "192.168.1.7:8443/run"),
        ({"host": "fd00::7"}, "[fd00::7]:8443/run"),
        ({"public_url": "https://up.example.com/gpu"}, "up.example.com/gpu/run"),
        ({"public_url": "http://up.example.com"}, "localhost:8443/run"),
    ],
)
def test_a_client_finds_the_server_where_it_listens(changes: dict[str, Any], host: str) -> None:
    """The address is the public one where there is one that fal's client can use."""
    assert client_environment(SERVER | changes)["FAL_RUN_HOST"] == host


def test_a_proxy_with_its_own_certificate_needs_no_authority_of_ours() -> None:
    """Behind a public https URL, or with the operator's certificate, nothing is printed about trust."""
    for changes in ({"public_url": "https://up.example.com"}, {"own_ca": False}):
        assert "SSL_CERT_FILE" not in client_environment(SERVER | changes)


def test_a_server_without_https_cannot_serve_fals_client() -> None:
    """The error names both ways out."""
    with pytest.raises(CommandFailed, match="--tls-port.*UPSCALER_PUBLIC_URL"):
        client_environment(SERVER | {"tls_port": 0})


def test_printed_variables_survive_the_shell() -> None:
    """Whatever a key or a path contains, a shell reads back what was meant."""
    key = "a b'$c\"`d`"

    assert exports(f"export FAL_KEY={shlex.quote(key)}\n") == {"FAL_KEY": key}


def test_env_without_a_server_says_how_to_start_one(tmp_path: Path) -> None:
    """The command fails with one line, and prints nothing that a shell would take."""
    answer = call("env", data=tmp_path)

    assert (answer.returncode, answer.stdout) == (1, "")
    assert "creative-upscaler serve" in answer.stderr


def test_serve_refuses_an_open_door(tmp_path: Path) -> None:
    """Beyond this machine it listens with a key, or when told so, and not otherwise."""
    answer = call("serve", "--host", "0.0.0.0", data=tmp_path)
    assert answer.returncode == 1
    assert "UPSCALER_API_KEYS" in answer.stderr and "--allow-unauthenticated" in answer.stderr

    refuse_open_door(Settings(data=tmp_path, host="0.0.0.0", api_keys=["key"]))
    refuse_open_door(Settings(data=tmp_path, host="0.0.0.0", allow_unauthenticated=True))
    refuse_open_door(Settings(data=tmp_path, host="localhost"))


def test_serve_names_a_port_that_is_taken(tmp_path: Path) -> None:
    """A port that somebody else listens on is an error with a way out, not a server that restarts for ever."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = Settings(data=tmp_path, port=taken.getsockname()[1], tls_port=0)

        with pytest.raises(CommandFailed, match="Choose another port"):
            check_ports(settings, patience_s=0.2)

    check_ports(settings)


def test_a_log_that_nobody_reads_breaks_nothing() -> None:
    """The reader of a role's log may end; the role goes on."""
    stream = io.StringIO()
    log = LogStream(stream)
    log.write("heard")
    assert stream.getvalue() == "heard"

    stream.close()

    log.write("not heard")
    log.flush()


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("gpu", False)],
)
def test_loopback_is_recognised(host: str, expected: bool) -> None:
    """A name that is not localhost may be anything."""
    assert is_loopback(host) is expected


def test_settings_that_make_no_sense_are_named(tmp_path: Path) -> None:
    """A value out of range is an error about the setting, not a traceback."""
    answer = call("serve", "--port", "99999", data=tmp_path)

    assert answer.returncode == 2
    assert "port" in answer.stderr and "Traceback" not in answer.stderr


def test_doctor_names_what_is_there_and_what_is_missing(tmp_path: Path) -> None:
    """Hardware, versions and weights are listed, missing files by name and with a way to get them."""
    answer = call("doctor", data=tmp_path)

    for word in (
        "python",
        "torch",
        "GPU",
        "pocket weights",
        "full weights",
        "missing: vae/config.json",
        "weights pull fal-ai/",
    ):
        assert word in answer.stdout


def test_run_hands_over_every_parameter(tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options are the endpoint's own names; the picture lands where it was asked for and its path is printed."""
    from server import slot

    monkeypatch.setattr(slot, "LocalRun", partial(slot.LocalRun, pipelines=PIPELINES))
    monkeypatch.setattr(command_line, "detect_gpus", list)
    monkeypatch.setattr(command_line, "configure_logging", lambda settings: None)
    source, output = tmp_path / "in.png", tmp_path / "out.png"
    Image.new("RGB", (20, 10), "teal").save(source)
    options = ["--scale", "3", "--creativity", "0.2", "--seed", "7", "--num_inference_steps", "2", "--skip_ccsr"]

    answer = CliRunner().invoke(
        build_app(),
        ["run", "fal-ai/creative-upscaler", str(source), "-o", str(output), "--data", str(tmp_path / "data"), *options],
    )

    assert answer.exit_code == 0, answer.output
    assert answer.stdout.strip().endswith(str(output))
    assert "60 x 30 px, seed 7" in answer.stderr
    with Image.open(output) as picture:
        assert picture.size == (60, 30)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--scale", "9"], "scale: Input should be less than or equal to 5"),
        (["--model_type", "SD_3"], "model_type: Input should be 'SD_1_5' or 'SDXL'"),
    ],
)
def test_run_refuses_what_the_endpoint_refuses(tmp_path: Path, options: list[str], text: str) -> None:
    """Ranges and values are checked before anything is loaded."""
    source = tmp_path / "in.png"
    Image.new("RGB", (20, 10), "teal").save(source)

    answer = call(
        "run", "fal-ai/creative-upscaler", str(source), "-o", str(tmp_path / "o.png"), *options, data=tmp_path
    )

    assert answer.returncode == 2
    assert text in " ".join(answer.stderr.split())


def test_the_light_roles_start_without_torch() -> None:
    """Neither gateway nor dispatcher nor supervisor loads torch: they start fast and survive what kills a slot."""
    program = (
        "import sys, server.app, server.dispatcher, server.__main__, server.doctor; sys.exit('torch' in sys.modules)"
    )

    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
