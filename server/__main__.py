"""The command line: `serve`, `run`, `weights`, `env`, `doctor`, `operate`, and hidden commands, a server's roles."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import io
import logging
import os
import shlex
import shutil
import signal
import socket
import sys
import time
import types
import typing
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TextIO
from urllib.parse import urlsplit

import structlog
import typer
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from server import lifeline, operate
from server.doctor import examine
from server.endpoints import ENDPOINTS, Endpoint
from server.errors import InvalidInput
from server.operate import OperationFailed
from server.settings import Settings, is_loopback
from server.supervisor import (
    CONFIGURATION_ERROR,
    AlreadyRunning,
    Supervisor,
    detect_gpus,
    plan_roles,
    plan_slots,
    read_server,
    sole_owner,
)
from server.weights_commands import weights_commands
from weights.catalogue import UnknownName
from weights.lock import LockUnreadable
from weights.placing import NoSpace
from weights.store import WeightsMissing, open_store

Weights = Literal["pocket", "full", "auto"]
Data = Annotated[Path | None, typer.Option(help="Folder of everything that is kept.", show_default=False)]
LifelineFd = Annotated[int | None, typer.Option("--lifeline", hidden=True)]

USAGE_ERROR = 2
DUMMY_KEY = "creative-upscaler:no-secret"
"""fal's clients refuse to work without a key, and its SDK without two parts; a server without keys takes any."""


class CommandFailed(Exception):
    """A command cannot do what it was asked to; the message says what to do."""


def main() -> None:
    """Entry point of `creative-upscaler` and `python -m server`."""
    try:
        build_app()()
    except (CommandFailed, AlreadyRunning, OperationFailed, WeightsMissing, NoSpace, LockUnreadable) as error:
        fail(str(error))
    except UnknownName as error:
        fail(str(error), USAGE_ERROR)
    except InvalidInput as error:
        fail("\n".join(f"{item['loc'][-1]}: {item['msg']}" for item in error.items), USAGE_ERROR)
    except ValidationError as error:
        fail("\n".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()), USAGE_ERROR)


def fail(message: str, status: int = 1) -> NoReturn:
    """Say why on standard error and exit."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]error:[/] {escape(message)}")
    sys.exit(status)


def build_app() -> typer.Typer:
    """Every command, the endpoints of `run` included."""
    app = typer.Typer(
        help="A self-hosted server for creative image upscaling that speaks fal's HTTP API.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.command()(serve)
    app.add_typer(run_commands(), name="run")
    app.add_typer(weights_commands(), name="weights")
    app.command()(env)
    app.command()(doctor)
    for command in operate.COMMANDS:
        app.command()(command)
    for role in (gateway, dispatcher, slot):
        app.command(hidden=True)(role)
    return app


def read_settings(**overrides: Any) -> Settings:
    """The settings, with what the command line gives on top."""
    return Settings(**{name: value for name, value in overrides.items() if value is not None})


def configure_logging(settings: Settings, role: str = "") -> None:
    """Log to standard error: lines for people at a terminal, JSON otherwise, those of other libraries included."""
    is_terminal = sys.stderr.isatty()
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    stream = typing.cast(TextIO, LogStream(sys.stderr))  # typeshed keeps TextIO apart from io's classes

    def add_role(logger: Any, method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        return {**event, "role": role} if role else event

    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=not is_terminal),
        add_role,
    ]
    last: list[structlog.typing.Processor] = (
        [structlog.dev.ConsoleRenderer()]
        if is_terminal
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    )
    structlog.configure(
        processors=[*shared, *last],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(stream),
    )
    handler = logging.StreamHandler(stream)
    cleaned = [structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last]
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=cleaned))
    logging.basicConfig(level=max(level, logging.WARNING), handlers=[handler], force=True)
    logging.captureWarnings(True)


class LogStream(io.TextIOBase):
    """A stream whose reader may go away: a lost log line must not take a role with it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write if somebody still reads."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush if somebody still reads."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()


# -- serve and its roles ---------------------------------------------------------------------------------------------


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(help="Port for plain HTTP, 0: none.", show_default="8000")] = None,
    tls_port: Annotated[int | None, typer.Option(help="Port for HTTPS, 0: none.", show_default="8443")] = None,
    fal_proxy: Annotated[
        int | None, typer.Option(help="Port of a CONNECT proxy for clients that keep fal's host names.", metavar="PORT")
    ] = None,
    data: Data = None,
    weights: Annotated[Weights | None, typer.Option(help="Which set of weights serves.", show_default="auto")] = None,
    slots: Annotated[
        int | None, typer.Option(help="Slots to run.", show_default="one per GPU, or one on the CPU", min=1)
    ] = None,
    allow_unauthenticated: Annotated[
        bool | None, typer.Option("--allow-unauthenticated", help="Listen beyond this machine without a key.")
    ] = None,
) -> None:
    """Start the server; stop it with Ctrl-C or SIGTERM. Requests that it interrupts are done at the next start."""
    settings = read_settings(
        host=host,
        port=port,
        tls_port=tls_port,
        fal_proxy_port=fal_proxy,
        data=data,
        weights=weights,
        slots=slots,
        allow_unauthenticated=allow_unauthenticated,
    )
    configure_logging(settings, "supervisor")
    refuse_open_door(settings)
    gpus = detect_gpus()
    store = open_store(settings.weights, root=settings.full_weights_dir, has_cuda=bool(gpus))
    with sole_owner(settings):
        check_ports(settings)
        planned = plan_slots(settings, gpus)
        structlog.get_logger().info(
            "starting",
            http=settings.port and f"http://{settings.host}:{settings.port}",
            https=settings.tls_port and f"https://{settings.host}:{settings.tls_port}",
            weights=store.name,
            slots=[f"{one.id}: {one.device}" for one in planned],
            clients=f'eval "$({own_command()} env --data {shlex.quote(str(settings.data))})"',
        )
        supervisor = Supervisor(settings, plan_roles(settings, planned))
        status = asyncio.run(supervisor.run())
    raise typer.Exit(status)


def own_command() -> str:
    """How a shell calls this program, which need not be on its path."""
    name = "creative-upscaler"
    return name if shutil.which(name) else shlex.quote(str(Path(sys.executable).with_name(name)))


def refuse_open_door(settings: Settings) -> None:
    """Raise unless strangers are kept out: by a key, by listening on this machine only, or on purpose."""
    if settings.api_keys or settings.allow_unauthenticated or is_loopback(settings.host):
        return
    raise CommandFailed(
        f"{settings.host} can be reached by others and no key is set. Set UPSCALER_API_KEYS to one or more keys, or "
        "pass --allow-unauthenticated to let everybody in."
    )


def check_ports(settings: Settings, patience_s: float = 5.0) -> None:
    """Raise unless the ports are free; those of a server that was just killed are, a moment later."""
    deadline = time.monotonic() + patience_s
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    for port in filter(None, (settings.port, settings.tls_port, settings.fal_proxy_port)):
        while True:
            try:
                socket.create_server((settings.host, port), family=family).close()
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    message = f"Cannot listen on {settings.host} port {port}: {error.strerror}. Choose another port."
                    raise CommandFailed(message) from error
            time.sleep(0.1)


def gateway(lifeline_fd: LifelineFd = None) -> None:
    """Serve HTTP."""
    import uvloop

    from server.app import serve_gateway

    settings = start_role(lifeline_fd, "gateway")
    run_role(serve_gateway(settings), uvloop.new_event_loop)


def dispatcher(slots: Annotated[str, typer.Option()] = "0", lifeline_fd: LifelineFd = None) -> None:
    """Give requests to slots and record how they end."""
    from server.dispatcher import serve_dispatcher

    settings = start_role(lifeline_fd, "dispatcher")
    run_role(serve_dispatcher(settings, slots.split(",")))


def slot(
    slot_id: Annotated[str, typer.Argument()],
    device: Annotated[str, typer.Option()] = "cpu",
    lifeline_fd: LifelineFd = None,
) -> None:
    """Own a device and run pipelines on it."""
    from server.slot import DeviceUnusable, serve_slot

    settings = start_role(lifeline_fd, f"slot-{slot_id}")
    # When memory runs out the kernel shall end the process that used it, not the ones that answer for it.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500")
    try:
        run_role(serve_slot(settings, slot_id, device))
    except (WeightsMissing, DeviceUnusable) as error:
        fail(str(error), CONFIGURATION_ERROR)
    finally:
        # A pipeline in the worker thread would hold up a regular exit until its picture is done.
        sys.stderr.flush()
    os._exit(0)


def start_role(lifeline_fd: int | None, role: str) -> Settings:
    """What every role does first; its settings come from the environment that the supervisor made."""
    if lifeline_fd is not None:
        lifeline.exit_when_cut(lifeline_fd)
    settings = read_settings()
    configure_logging(settings, role)
    settings.make_folders()
    return settings


def run_role(
    work: Coroutine[Any, Any, None], loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None
) -> None:
    """Run a role until it ends or SIGTERM cancels it, on asyncio's own event loop or another one."""

    async def scene() -> None:
        task = asyncio.ensure_future(work)
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        with contextlib.suppress(asyncio.CancelledError):
            await task

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(scene())


# -- env -------------------------------------------------------------------------------------------------------------


def env(
    fal_proxy: Annotated[
        bool, typer.Option("--fal-proxy", help="For a client that keeps fal's host names, uploads included.")
    ] = False,
    data: Data = None,
) -> None:
    """Print the environment that points an unmodified fal client at the running server.

    For a shell: eval "$(creative-upscaler env)".
    """
    settings = read_settings(data=data)
    server = read_server(settings)
    if server is None:
        raise CommandFailed(f"No server runs on {settings.data}. Start one with `creative-upscaler serve`.")
    found = proxy_environment(server) if fal_proxy else client_environment(server)
    for name, value in found.items():
        typer.echo(f"export {name}={shlex.quote(value)}")


def client_environment(server: dict[str, Any]) -> dict[str, str]:
    """What fal's clients read, for a server that describes itself so (`server.json`).

    The Python client forces https, hence a server without any is an error.
    """
    public = urlsplit(server["public_url"] or "")
    if public.scheme == "https":
        base = public.netloc + public.path
    elif server["tls_port"]:
        base = f"{local_name(server)}:{server['tls_port']}"
    else:
        raise CommandFailed(
            "fal's Python client speaks https only, and this server has neither a TLS port nor a public https URL. "
            "Start it with --tls-port, or set UPSCALER_PUBLIC_URL to the https address of the proxy before it."
        )
    found = {
        "FAL_RUN_HOST": f"{base}/run",
        "FAL_QUEUE_RUN_HOST": f"{base}/queue",
        "FAL_REST_HOST": f"{base}/rest",
        "FAL_KEY": server["key"] or DUMMY_KEY,
        "CREATIVE_UPSCALER_URL": f"https://{base}",
    }
    return found if public.scheme == "https" else found | authority_environment(server)


def proxy_environment(server: dict[str, Any]) -> dict[str, str]:
    """What leads a client that keeps fal's host names to a server that describes itself so."""
    if not server["fal_proxy_port"]:
        raise CommandFailed(
            "The server has no CONNECT proxy. Start it with `creative-upscaler serve --fal-proxy PORT`."
        )
    # The proxy refuses all but fal's names; the URLs in answers may name the public address, which needs no proxy.
    direct = ["localhost", "127.0.0.1", urlsplit(server["public_url"] or "").hostname]
    return {
        "HTTPS_PROXY": f"http://{local_name(server)}:{server['fal_proxy_port']}",
        "NO_PROXY": ",".join(filter(None, direct)),
        "NODE_USE_ENV_PROXY": "1",
        "FAL_KEY": server["key"] or DUMMY_KEY,
        **authority_environment(server),
    }


def local_name(server: dict[str, Any]) -> str:
    """The name by which a client reaches the listening address."""
    # Our certificate names localhost, and whoever listens everywhere listens there too.
    is_here = is_loopback(server["host"]) or server["host"] in ("0.0.0.0", "::")
    name: str = "localhost" if is_here else server["host"]
    return f"[{name}]" if ":" in name else name


def authority_environment(server: dict[str, Any]) -> dict[str, str]:
    """What makes clients trust our own authority; nothing where the operator's certificate serves."""
    if not server["own_ca"]:
        return {}
    folder = Path(server["trust_dir"])
    return {"SSL_CERT_FILE": str(folder / "ca-bundle.pem"), "NODE_EXTRA_CA_CERTS": str(folder / "ca.pem")}


def doctor(data: Data = None) -> None:
    """Say what this machine has, which weights are there, and what is missing; exits 1 when `serve` would not start."""
    settings = read_settings(data=data)
    for line in examine(settings):
        typer.echo(line)
    store = open_store(settings.weights, root=settings.full_weights_dir, has_cuda=bool(detect_gpus()))
    typer.echo(f"`serve` would use the {store.name} weights (weights = {settings.weights}).")


# -- run -------------------------------------------------------------------------------------------------------------


def run_commands() -> typer.Typer:
    """`run`: one command per endpoint, with the endpoint's parameters as options."""
    commands = typer.Typer(
        help="Run an endpoint on a picture, here and now, without a server.",
        no_args_is_help=True,
        subcommand_metavar="ENDPOINT IMAGE -o OUT [PARAMETERS]",
    )
    for endpoint in ENDPOINTS.values():
        commands.command(endpoint.id, help=f"Run {endpoint.id} on a picture.")(run_command(endpoint))
    return commands


def run_command(endpoint: Endpoint[Any]) -> Callable[..., None]:
    """A command for one endpoint; its options are the fields of the input model, under their own names."""

    def command(image: Path, output: Path, weights: Weights, data: Path | None, **parameters: Any) -> None:
        settings = read_settings(data=data, weights=weights)
        given = {name: value for name, value in parameters.items() if value is not None}
        upscale(settings, endpoint, image, output, given)

    fixed = {
        "image": Annotated[Path, typer.Argument(help="The picture.", exists=True, dir_okay=False)],
        "output": Annotated[Path, typer.Option("--output", "-o", help="Where to write the PNG.")],
        "weights": Annotated[Weights, typer.Option(help="Which set of weights to use.")],
        "data": Data,
    }
    defaults = {"weights": "auto", "data": None}
    fields = {
        name: option_of(name, field) for name, field in endpoint.input_model.model_fields.items() if name != "image_url"
    }
    keyword = inspect.Parameter.KEYWORD_ONLY
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # typer reads options from the signature
        [
            inspect.Parameter(name, keyword, annotation=kind, default=defaults.get(name, inspect.Parameter.empty))
            for name, kind in fixed.items()
        ]
        + [inspect.Parameter(name, keyword, annotation=kind, default=None) for name, kind in fields.items()]
    )
    command.__annotations__ = fixed | fields
    return command


def option_of(name: str, field: FieldInfo) -> Any:
    """The option for a field: `--name VALUE`, or `--name/--no-name` for a switch; the endpoint checks the range."""
    kinds = [kind for kind in flatten(field.annotation) if kind is not types.NoneType]
    kind = next((kind for kind in (bool, int, float) if kinds == [kind]), str)
    flag = f"--{name}/--no-{name}" if kind is bool else f"--{name}"
    choices = [str(choice) for choice in kinds if isinstance(choice, str)]
    notes = [f"One of {', '.join(choices)}."] if choices else []
    if field.default is not None:
        notes.append(f"Default: {field.default!r}.")
    text = " ".join([(field.description or "").strip(), *notes])
    return Annotated[kind | None, typer.Option(flag, help=text, show_default=False, rich_help_panel="Parameters")]


def flatten(annotation: Any) -> list[Any]:
    """The plain types and literal values of an annotation: `float | None` gives both, `Literal["a"]` gives `"a"`."""
    arguments = typing.get_args(annotation)
    if not arguments:
        return [annotation]
    if typing.get_origin(annotation) is Annotated:
        arguments = arguments[:1]
    return [kind for argument in arguments for kind in flatten(argument)]


def upscale(settings: Settings, endpoint: Endpoint[Any], image: Path, output: Path, given: dict[str, Any]) -> None:
    """Make one picture in this process, with the code that a slot runs, and show how far it is."""
    # The picture's bytes go to the pipeline directly; its URL stands for it in the checks of the input.
    job = endpoint.job(endpoint.parse({"image_url": image.absolute().as_uri(), **given}))
    configure_logging(settings.model_copy(update={"log_level": "warning"}))
    console = Console(stderr=True, highlight=False)
    for warning in job["warnings"]:
        console.print(f"[yellow]note:[/] {warning}")
    with console.status("loading"):
        from server.slot import DeviceUnusable, LocalRun, NotMade

        try:
            run = LocalRun(settings, device="cuda" if detect_gpus() else "cpu")
        except DeviceUnusable as error:
            raise CommandFailed(str(error)) from error
    try:
        with stage_bars(console) as report:
            made = run.make(job, image.read_bytes(), output, report)
    except NotMade as error:
        raise CommandFailed(str(error)) from error
    console.print(f"{made.width} x {made.height} px, seed {made.seed}, {made.timings['inference']:.1f} s")
    typer.echo(output)


@contextlib.contextmanager
def stage_bars(console: Console) -> Iterator[Callable[[Any], None]]:
    """A bar for each stage of a pipeline; yields the function that takes its reports."""
    columns = (TextColumn("{task.description:<16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def report(report: Any) -> None:
            if report.message is not None:
                bars.console.print(report.message)
                return
            if report.stage not in tasks:
                tasks[report.stage] = bars.add_task(report.stage, total=max(1, report.total))
            done = max(1, report.total) if report.seconds is not None else report.step
            bars.update(tasks[report.stage], total=max(1, report.total), completed=done)

        yield report


if __name__ == "__main__":
    main()
