"""Our pages: every example is followed by a test, every command and every link leads somewhere."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import typer.main
from markdown_it import MarkdownIt
from markdown_it.token import Token

from server.__main__ import build_app
from tests.acceptance.recipes import README, all_recipes, recipes
from weights.pocket import train

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "weights/**/*.md", "tests/**/*.md", "server/**/*.md", "benchmarks/**/*.md")
    for path in ROOT.glob(pattern)
)


def followed() -> Iterator[tuple[str, str, str]]:
    """Page, heading and language of what tests take from our pages: their calls of `recipes`."""
    for file in (ROOT / "tests").rglob("*.py"):
        source = file.read_text()
        if "recipes(" not in source:
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "recipes":
                heading, language, *page = (ast.literal_eval(argument) for argument in node.args)
                yield page[0] if page else README, heading, language


def words(page: str) -> list[Token]:
    """Texts, links, pictures and pieces of code of a page, in order."""
    tokens = MarkdownIt().enable("table").parse((ROOT / page).read_text())
    return [child for token in tokens for child in token.children or ()]


def code(page: str) -> str:
    """Everything that a page shows as code."""
    inline = [token.content for token in words(page) if token.type == "code_inline"]
    return "\n".join([*inline, *(recipe.text for recipe in all_recipes(page))])


def anchors(page: str) -> set[str]:
    """The names of a page's headings in links, as they are made for Markdown on the web."""
    titles = re.findall(r"^#+ (.*)$", (ROOT / page).read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_example_is_followed_by_a_test() -> None:
    """No fenced block that no test takes, and no test of one that is gone."""
    shown = {(page, recipe.heading, recipe.language) for page in PAGES for recipe in all_recipes(page)}

    assert shown == set(followed())


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    """Files are there, and the headings that links name."""
    for token in words(page):
        target = urlsplit(str(token.attrGet("href") or token.attrGet("src") or ""))
        if target.scheme:
            continue
        file = (ROOT / page).parent / target.path if target.path else ROOT / page
        assert file.exists(), target.path
        if target.fragment:
            assert target.fragment in anchors(str(file.relative_to(ROOT)))


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist(page: str) -> None:
    """`python -m MODULE`, `creative-upscaler COMMAND` and `make TARGET` are what there is."""
    text = code(page)
    commands = typer.main.get_command(build_app()).commands  # type: ignore[attr-defined]  # a group, not a command
    modules = set(re.findall(r"python -m ([a-z_.]+)", text))
    targets = set(re.findall(r"^make ([a-z-]+)", text, re.MULTILINE))

    assert not [name for name in modules if importlib.util.find_spec(name) is None]
    assert set(re.findall(r"creative-upscaler ([a-z]+)(?= |$)", text, re.MULTILINE)) <= commands.keys()
    for target in targets:
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, check=True)


def test_training_is_called_as_the_page_says(capsys: pytest.CaptureFixture[str]) -> None:
    """Parts and options of the training program are those that the page names."""
    (usage,) = recipes("Training", "", "weights/pocket/README.md")
    program, _, options = usage.strip().partition(" PART ")
    with pytest.raises(SystemExit):
        train.parse(["--help"])
    said = capsys.readouterr().out
    named = re.search(r"PART is one of (.*) or `all`", (ROOT / "weights/pocket/README.md").read_text())

    assert named is not None
    assert program == f"python -m {train.__name__}"
    assert "{" + ",".join([*re.findall(r"`(\w+)`", named[1]), "all"]) + "}" in said
    assert all(option in said for option in re.findall(r"--\w+", options))
