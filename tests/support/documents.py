"""The pages of the documents, their blocks, their commands, and the scripts beside them."""

from __future__ import annotations

import importlib
import importlib.util
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
    """Return the fenced blocks of a page in a language. The language "" stands for blocks without one."""
    name = page.relative_to(REPOSITORY).as_posix()
    fences = FENCE.findall(page.read_text(encoding="utf-8"))
    return [Block(name, language, text) for its_language, text in fences if its_language == language]


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words of every command of a shell block, without the variables that are set before it."""
    for line in text.replace("\\\n", " ").splitlines():
        for command in line.split("&&"):
            words = shlex.split(command, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words.pop(0)
            if words:
                yield words


def program(words: list[str]) -> tuple[Any, list[str]]:
    """Return the main function of a command's program, and the command's arguments."""
    if words[0] == "latent-grpo":
        return cli.main, words[1:]
    name = words[2]
    if name in ("latent_grpo", "bench"):
        name = {"latent_grpo": "latent_grpo.commands.main", "bench": "bench.__main__"}[name]
    return importlib.import_module(name).main, words[3:]


def commands_of(page: Path) -> Iterator[list[str]]:
    """Yield every command of a page: first of its shell blocks, then of its text."""
    for block in blocks(page, "bash"):
        yield from commands(block.text)
    for inline in INLINE.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if not re.search(r"[A-Z]{3,}(?![\w=.])", inline):  # not a pattern such as `latent-grpo COMMAND`
            yield from commands(inline)


def script(name: str) -> Any:
    """Return the module of docs/NAME.py, which belongs to no package."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", REPOSITORY / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
