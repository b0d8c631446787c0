"""The page of all options and flags, from their own documentation: `python docs/options.py FILE`."""

from __future__ import annotations

import argparse
import inspect
import re
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from latent_grpo.commands.doctor import doctor_parser
from latent_grpo.commands.evaluate import eval_parser
from latent_grpo.commands.generate import generate_parser
from latent_grpo.commands.inspect import inspect_parser
from latent_grpo.commands.probes import probes_parser
from latent_grpo.commands.quickstart import quickstart_parser
from latent_grpo.config import EncodeConfig, LatentGRPOConfig, LatentSampling, LatentSFTConfig, Range
from latent_grpo.study.config import CompareConfig

COMMAND = "python docs/options.py docs/options.md"
CONFIGS = (LatentGRPOConfig, LatentSFTConfig, EncodeConfig, LatentSampling, CompareConfig)
PARSERS = {
    "quickstart": quickstart_parser,
    "probes": probes_parser,
    "eval": eval_parser,
    "generate": generate_parser,
    "inspect": inspect_parser,
    "doctor": doctor_parser,
}
INTRODUCTION = f"""# Options

Written by `{COMMAND}` from `latent_grpo/config` and `latent_grpo/commands`;
do not edit.

`latent-grpo train`, `sft`, `encode` and `compare` take each option as a flag (`--learning_rate 1e-5`) and as a key of
the YAML file of `--config`; flags win. In Python the options are the fields of `LatentGRPOConfig` (train),
`LatentSFTConfig` (sft), `EncodeConfig` (encode), `CompareConfig` (compare) and `LatentSampling` (`generate_latent`).
These configurations share the groups below. Names are TRL's where TRL has one. Every command also takes `--model`,
`--data` and `--out`, where it has such an option. The other commands have
[only flags](#flags-of-the-other-commands).
"""


def groups() -> dict[type, list[tuple[Field[Any], str]]]:
    """Return every dataclass that a configuration is made of, with the options that it introduces or gives a new
    default, and their annotations."""
    found: dict[type, list[tuple[Field[Any], str]]] = {}
    for config in CONFIGS:
        for part in reversed(config.__mro__[:-1]):
            own = inspect.get_annotations(part)
            found.setdefault(part, [(f, str(own[f.name])) for f in fields(part) if f.name in own])
    return found


def escaped(text: str) -> str:
    """Return text for a cell of a table."""
    return text.replace("|", "\\|")


def values_of(annotation: str, allowed: Range | None) -> str:
    """Return what an option takes: the choices of a Literal, else the type and the range."""
    choices = re.fullmatch(r"Literal\[(.*)\]", annotation)
    if choices:
        return ", ".join(f"`{choice.strip()}`" for choice in choices[1].replace('"', "").replace("'", "").split(","))
    return escaped(f"`{annotation}`") + (f", {allowed}" if allowed is not None else "")


def default_of(option: Field[Any]) -> str:
    """Return the default as Python code."""
    value = option.default_factory() if option.default_factory is not MISSING else option.default
    return f"`{value!r}`"


def taken_by(flag: argparse.Action) -> str:
    """Return what a flag takes: its choices, else the type, or nothing for a switch."""
    if flag.nargs == 0:
        return "nothing"
    kind = getattr(flag.type, "__name__", "str")
    taken = ", ".join(f"`{choice}`" for choice in flag.choices or (kind,))
    return f"{taken}, one or more" if flag.nargs == "+" else taken


def flags_of(parser: argparse.ArgumentParser) -> list[str]:
    """Return a row of the table for every flag except --help."""
    rows = []
    for flag in parser._actions:
        if flag.dest == "help":
            continue
        names = ", ".join(f"`{name}`" for name in flag.option_strings or [flag.dest])
        default = "required" if flag.required else f"`{flag.default!r}`"
        # The default has a column of its own.
        meaning = re.sub(r" \[[^\]]*\]$", "", str(flag.help)).replace("%%", "%")
        rows.append(f"| {names} | {taken_by(flag)} | {default} | {escaped(meaning)} |")
    return rows


def commands() -> list[str]:
    """Return the lines of the commands that have flags of their own."""
    lines = ["## Flags of the other commands", ""]
    for command, make in PARSERS.items():
        parser = make(f"latent-grpo {command}")
        lines += [f"### latent-grpo {command}", "", str(parser.description), ""]
        lines += ["| flag | takes | default | |", "| --- | --- | --- | --- |", *flags_of(parser), ""]
    return lines


def relatives(part: type) -> str:
    """Return the groups that a configuration consists of, or the configurations that a group is part of."""
    if part in CONFIGS:
        inherited = [other for other in groups() if other is not part and issubclass(part, other)]
        links = ", ".join(f"[{other.__name__}](#{other.__name__.lower()})" for other in inherited)
        return f" It inherits {links}." if links else ""
    return f" Part of {', '.join(f'`{config.__name__}`' for config in CONFIGS if issubclass(config, part))}."


def page() -> str:
    """Return the page in Markdown."""
    lines = [INTRODUCTION]
    for part, options in groups().items():
        lines += [f"## {part.__name__}", "", f"{(part.__doc__ or '').strip()}{relatives(part)}", ""]
        if not options:
            continue
        lines += ["| option | takes | default | |", "| --- | --- | --- | --- |"]
        for option, annotation in options:
            meaning = escaped(str(option.metadata["help"]))
            taken = values_of(annotation, option.metadata["range"])
            lines.append(f"| `{option.name}` | {taken} | {default_of(option)} | {meaning} |")
        lines.append("")
    return "\n".join([*lines, *commands()]).rstrip() + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(prog="python docs/options.py", description=__doc__)
    parser.add_argument("file", type=Path, help="Markdown file to write")
    parser.parse_args(arguments).file.write_text(page())


if __name__ == "__main__":
    main()
