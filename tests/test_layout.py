"""The structure that the design promises, asserted from the source: who imports whom, and what stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from server.endpoints import ENDPOINTS
from server.settings import Settings

ROOT = Path(__file__).parent.parent
PACKAGES = ("server", "pipelines", "weights")
MAY_IMPORT = {
    "server": {"server", "pipelines", "weights"},
    "pipelines": {"pipelines", "weights"},
    "weights": {"weights"},
}
TORCH = {"torch", "diffusers", "transformers", "accelerate", "pipelines"}


def modules() -> dict[str, Path]:
    """Every module of the three packages by its dotted name."""
    found = {}
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            parts = file.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(file: Path, *, top_level_only: bool = False) -> set[str]:
    """Dotted names that a file imports; those under `if TYPE_CHECKING` do not count."""
    tree = ast.parse(file.read_text())
    if top_level_only:
        nodes: list[ast.AST] = list(tree.body)
    else:
        nodes = list(ast.walk(tree))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    found = set()
    for node in nodes:
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_point_one_way(name: str) -> None:
    """server imports pipelines, pipelines import weights, never back."""
    package = name.split(".")[0]
    ours = {imported.split(".")[0] for imported in imports(modules()[name])} & set(PACKAGES)

    assert ours <= MAY_IMPORT[package]


def test_only_the_slot_touches_pixels() -> None:
    """In the server package nothing but the slot imports torch or the pipelines."""
    touching = {
        name
        for name, file in modules().items()
        if name.startswith("server") and {i.split(".")[0] for i in imports(file)} & TORCH
    }

    assert touching == {"server.slot"}


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_have_no_import_cycles(package: str) -> None:
    """Modules of a package can be read in an order in which each knows only earlier ones."""
    ours = {name: file for name, file in modules().items() if name.split(".")[0] == package}
    graph = {name: imports(file, top_level_only=True) & (set(ours) - {name, package}) for name, file in ours.items()}

    assert len(list(TopologicalSorter(graph).static_order())) >= len(ours)


@pytest.mark.parametrize("role", ["server.app", "server.dispatcher", "server.supervisor", "server.__main__"])
def test_roles_without_pixels_never_load_torch(role: str) -> None:
    """Gateway, dispatcher, supervisor and the command line start without torch."""
    code = f"import sys, {role}; print(sorted({{'torch', 'diffusers', 'transformers'}} & set(sys.modules)))"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)

    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", sorted(modules()))
def test_every_module_says_what_it_is_for(name: str) -> None:
    """Every module has a docstring."""
    source = modules()[name].read_text()

    assert not source.strip() or ast.get_docstring(ast.parse(source))


def settings_rows() -> list[str]:
    """The rows of the README's table of settings."""
    rows = []
    for name, field in Settings.model_fields.items():
        default = field.get_default(call_default_factory=True, validated_data={})
        shown = "–" if default in (None, [], {}, "") else default
        rows.append(f"| `UPSCALER_{name.upper()}` | {shown} | {field.description} |")
    return rows


def test_readme_lists_every_setting_and_endpoint() -> None:
    """The README's tables do not lag the code."""
    readme = (ROOT / "README.md").read_text()

    assert not [row for row in settings_rows() if row not in readme]
    assert not [endpoint for endpoint in ENDPOINTS if f"`{endpoint}`" not in readme]
