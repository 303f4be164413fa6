"""Image, compose file, systemd unit and nginx example: in step with settings and Makefile, right by their own tools."""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.specifiers import SpecifierSet

from server.__main__ import USAGE_ERROR
from server.settings import Settings
from server.supervisor import CONFIGURATION_ERROR, plan_roles, plan_slots
from tests.acceptance.debian import installed

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "server" / "deploy"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MANY_GPUS = [str(n) for n in range(8)]
MAX_EXPOSURE = 25  # of systemd's 100; a plain unit has 96
COMPOSE = {"UPSCALER_API_KEYS": "a,b", "PIP_EXTRA_INDEX_URL": "https://example.com/cpu"}


def dockerfile() -> list[tuple[str, str]]:
    """The Dockerfile's instructions and their arguments."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", "")
    words = [line.split(maxsplit=1) for line in text.splitlines() if line]
    return [(instruction, " ".join(argument.split())) for instruction, argument in words]


def arguments(instruction: str) -> list[str]:
    """The arguments of all instructions of a kind."""
    return [argument for name, argument in dockerfile() if name == instruction]


def copied() -> list[str]:
    """What the Dockerfile copies from the repository."""
    return [source for argument in arguments("COPY") for source in argument.split()[:-1]]


def image_environment() -> dict[str, str]:
    """The variables that the image sets."""
    return dict(word.split("=", 1) for argument in arguments("ENV") for word in shlex.split(argument))


def commands(folder: Path, target: str) -> list[str]:
    """What make would do for a target in a folder where nothing is installed."""
    dry_run = ["make", "--dry-run", "--no-print-directory", "VENV=nowhere", target]
    return subprocess.run(dry_run, cwd=folder, capture_output=True, text=True, check=True).stdout.splitlines()


def longest_stop_s(drain_s: float) -> float:
    """Seconds within which the server's processes have ended, on a box with many GPUs."""
    settings = Settings(drain_s=drain_s)
    return sum(role.stop_s for role in plan_roles(settings, plan_slots(settings, MANY_GPUS)))


def check_settings(environment: dict[str, Any]) -> None:
    """Every variable of ours is a setting, and its value one that the setting takes."""
    ours = {name.removeprefix("UPSCALER_").lower(): value for name, value in environment.items() if "UPSCALER" in name}

    assert ours and ours.keys() <= Settings.model_fields.keys()
    Settings(**{name: value for name, value in ours.items() if value is not None})


# -- the image ---------------------------------------------------------------------------------------------------------


def test_image_and_makefile_install_alike(tmp_path: Path) -> None:
    """With the files that each step finds, the image's make does what `make install` does here."""
    done: list[str] = []
    for instruction, argument in dockerfile():
        if instruction == "COPY":
            for source in argument.split()[:-1]:
                origin = ROOT / source
                (tmp_path / source).mkdir() if origin.is_dir() else shutil.copy(origin, tmp_path / source)
        elif instruction == "RUN" and argument.startswith("make "):
            planned = commands(tmp_path, argument.removeprefix("make "))
            assert planned[: len(done)] == done, "a later step begins with what an earlier one did"
            done = planned
        elif instruction == "RUN":
            assert re.match(r"apt-get update |python -c ", argument) and "pip" not in argument.replace("PIP_", "")

    assert done == commands(ROOT, "install")


def test_a_change_of_the_code_keeps_the_layer_of_libraries() -> None:
    """Before libraries are installed nothing is copied but what decides which."""
    steps = dockerfile()
    before = steps[: steps.index(("RUN", "make dependencies"))]

    assert [argument for name, argument in before if name == "COPY"] == ["pyproject.toml constraints.txt Makefile ./"]


def test_image_holds_what_the_package_needs() -> None:
    """All packages, what describes them, what installs them; nothing else is sent to the builder."""
    find = PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    folders = [path.parent.name for path in ROOT.glob("*/__init__.py")]
    packages = [name for name in folders if any(fnmatch.fnmatch(name, pattern) for pattern in find)]
    described = ["pyproject.toml", "constraints.txt", "Makefile", PROJECT["project"]["readme"]]
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]

    assert sorted(copied()) == sorted([*described, *packages])
    assert ignored == ["*", *(f"!{name}" for name in copied()), "**/__pycache__"]


def test_image_suits_python_and_settings() -> None:
    """A supported Python, ports and folder as the settings have them."""
    (version,) = re.findall(r"^PYTHON_IMAGE=python:([\d.]+)-slim-\w+$", arguments("ARG")[0])
    fields = Settings.model_fields

    assert version in SpecifierSet(PROJECT["project"]["requires-python"])
    assert arguments("EXPOSE") == [f"{fields['port'].default} {fields['tls_port'].default}"]
    assert arguments("VOLUME") == [image_environment()["UPSCALER_DATA"]]
    check_settings(image_environment())


def test_image_is_built_carefully() -> None:
    """One variant for CPU and one for GPU, each sure of its torch; not root; nothing is left of apt and pip."""
    steps = dockerfile()
    apt = " ".join(argument for argument in arguments("RUN") if "apt-get" in argument)

    assert [argument.rpartition(" AS ")[2] for argument in arguments("FROM")] == ["installed", "cpu", "cuda"]
    for name in ("cpu", "cuda"):
        check = next(step for step in steps[steps.index(("FROM", f"installed AS {name}")) :] if step[0] == "RUN")
        assert "torch.version.cuda" in check[1]
    assert arguments("USER")[-1].isdecimal() and arguments("USER")[-1] != "0"
    assert not arguments("ADD")
    assert "--no-install-recommends" in apt and "rm -rf /var/lib/apt/lists/*" in apt
    assert image_environment()["PIP_NO_CACHE_DIR"] == "1"


# -- compose -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["gpu", "cpu"])
def service(request: pytest.FixtureRequest) -> dict[str, Any]:
    """A service of the compose file, as docker-compose reads it."""
    tool = installed(Path("/usr/bin/docker-compose"), "docker-compose")
    # Debian 12 has a version that does not know the project's name in the file yet.
    text = re.sub(r"^name: .*\n", "", (DEPLOY / "compose.yaml").read_text(), flags=re.MULTILINE)
    command = [tool, "--file", "-", "--profile", request.param, "config"]
    environment = {"PATH": os.environ["PATH"], **COMPOSE}
    done = subprocess.run(command, input=text, env=environment, cwd=DEPLOY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = yaml.safe_load(done.stdout)["services"][request.param]
    return found


def test_compose_runs_the_image(service: dict[str, Any]) -> None:
    """Targets, arguments, ports and the volume are the Dockerfile's; names and values are settings."""
    build, (volume,) = service["build"], service["volumes"]
    ports = [str(port["target"]) if isinstance(port, dict) else port.split(":")[-1] for port in service["ports"]]

    assert Path(build["context"]).resolve() == ROOT
    assert f"installed AS {build['target']}" in arguments("FROM")
    assert build.get("args", {}).keys() <= set(arguments("ARG"))
    assert sorted(port.removesuffix("/tcp") for port in ports) == arguments("EXPOSE")[0].split()
    assert volume.split(":")[1] == arguments("VOLUME")[0]
    check_settings(service["environment"])


def test_compose_waits_until_the_server_has_stopped(service: dict[str, Any]) -> None:
    """Docker kills no sooner than the supervisor would."""
    drain_s = float(service["environment"]["UPSCALER_DRAIN_S"])

    assert _seconds(service["stop_grace_period"]) > longest_stop_s(drain_s)
    assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"]


def test_compose_wants_a_key() -> None:
    """Without one it says so, instead of serving everybody."""
    service = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["x-server"]

    assert re.fullmatch(r"\$\{UPSCALER_API_KEYS:\?.+\}", service["environment"]["UPSCALER_API_KEYS"])


def _seconds(text: str) -> float:
    """The seconds of a duration such as `2m0s`."""
    units = {"h": 3600, "m": 60, "s": 1}
    return sum(float(number) * units[unit] for number, unit in re.findall(r"([\d.]+)([hms])", text))


# -- systemd -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit, with programs and folders that are here."""
    text = (DEPLOY / "creative-upscaler.service").read_text()
    text = re.sub("^ExecStart=.*", "ExecStart=/bin/true", text, flags=re.MULTILINE)
    text = re.sub("^WorkingDirectory=.*", "WorkingDirectory=/", text, flags=re.MULTILINE)
    path = tmp_path / "creative-upscaler.service"
    path.write_text(text)
    return path


def directives() -> dict[str, str]:
    """The unit's directives; the last of a name counts."""
    lines = (DEPLOY / "creative-upscaler.service").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


def test_systemd_takes_the_unit(unit: Path) -> None:
    """No directive that it does not know, and little that the service could harm."""
    tool = installed(Path("/usr/bin/systemd-analyze"), "systemd")
    verified = subprocess.run([tool, "verify", unit], capture_output=True, text=True)
    threshold = ["--offline=true", f"--threshold={MAX_EXPOSURE}", "--no-pager"]
    secured = subprocess.run([tool, "security", *threshold, unit], capture_output=True, text=True)

    assert (verified.returncode, verified.stderr) == (0, "")
    assert secured.returncode == 0, secured.stdout


def test_systemd_lets_the_supervisor_stop_its_processes() -> None:
    """The signal goes to the supervisor alone, with time for all of them; what no restart can help is not restarted."""
    unit = directives()
    environment = dict(word.split("=", 1) for word in unit["Environment"].split())

    assert unit["KillMode"] == "mixed" and unit["OOMPolicy"] == "continue"
    assert float(unit["TimeoutStopSec"]) > longest_stop_s(float(environment["UPSCALER_DRAIN_S"]))
    assert unit["RestartPreventExitStatus"].split() == [str(USAGE_ERROR), str(CONFIGURATION_ERROR)]
    assert environment["UPSCALER_DATA"] == f"%S/{unit['StateDirectory']}"
    check_settings(environment)


# -- nginx: tests/acceptance/test_readme.py runs it --------------------------------------------------------------------


def test_nginx_lets_through_what_the_server_takes() -> None:
    """Its limits are no narrower than the defaults of the settings."""
    block, settings = (DEPLOY / "nginx.conf").read_text(), Settings()
    (gigabytes,) = re.findall(r"client_max_body_size (\d+)g;", block)
    (hours,) = re.findall(r"proxy_read_timeout (\d+)h;", block)

    assert int(gigabytes) * 1024 >= max(settings.max_upload_mb, settings.max_body_mb)
    assert int(hours) * 3600 > settings.run_silence_s
    assert f"http://127.0.0.1:{settings.port};" in block
