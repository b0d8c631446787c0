"""The pages of the documents, their blocks, and the commands in these."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from latent_grpo.commands import main as cli
from support import REPOSITORY

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:python (?:-m|docs/)|latent-grpo )[^`]*)`")


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    language: str
    text: str


def blocks(page: Path, language: str) -> list[Block]:
    return [
        Block(page.relative_to(REPOSITORY).as_posix(), found, text)
        for found, text in FENCE.findall(page.read_text(encoding="utf-8"))
        if found == language
    ]


def commands(text: str) -> Iterator[list[str]]:
    """The words of every command of a shell block, without variables set in front."""
    for line in text.replace("\\\n", " ").splitlines():
        for part in line.split("&&"):
            words = shlex.split(part, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words.pop(0)
            if words:
                yield words


def program(words: list[str]) -> tuple[Any, list[str]]:
    """The function that takes a command's arguments, and these."""
    if words[0] == "latent-grpo":
        return cli.main, words[1:]
    name = words[2]
    if name in ("latent_grpo", "bench"):
        name = {"latent_grpo": "latent_grpo.commands.main", "bench": "bench.__main__"}[name]
    return importlib.import_module(name).main, words[3:]


def commands_of(page: Path) -> Iterator[list[str]]:
    """Every command of a page: of its shell blocks, then those in its text."""
    for block in blocks(page, "bash"):
        yield from commands(block.text)
    for inline in INLINE.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if not re.search(r"[A-Z]{3,}(?![\w=.])", inline):  # not a pattern such as `latent-grpo COMMAND`
            yield from commands(inline)
