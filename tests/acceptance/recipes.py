"""The examples in our pages, as tests take them from there."""

from __future__ import annotations

from typing import NamedTuple

from markdown_it import MarkdownIt

from tests.acceptance.live import ROOT

README = "README.md"


class Recipe(NamedTuple):
    """A fenced block: the heading above it, its language, its text."""

    heading: str
    language: str
    text: str


def all_recipes(page: str) -> list[Recipe]:
    """Every fenced block of a page."""
    tokens = MarkdownIt().parse((ROOT / page).read_text())
    heading, found = "", []
    for token, after in zip(tokens, [*tokens[1:], None], strict=True):
        if token.type == "heading_open" and after is not None:
            heading = after.content
        elif token.type == "fence":
            found.append(Recipe(heading, token.info, token.content))
    return found


def recipes(heading: str, language: str, page: str = README) -> list[str]:
    """The blocks of a language below a heading; a caller unpacks them all, so that none is added unnoticed."""
    found = [recipe.text for recipe in all_recipes(page) if recipe[:2] == (heading, language)]
    assert found, f"{page} has no recipe in {language} under {heading}"
    return found
