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
from latent_grpo.commands.quickstart import quickstart_parser
from latent_grpo.config import CompareConfig, LatentGRPOConfig, LatentSampling, LatentSFTConfig

COMMAND = "python docs/options.py docs/options.md"
CONFIGS = (LatentGRPOConfig, LatentSFTConfig, LatentSampling, CompareConfig)
PARSERS = {
    "quickstart": quickstart_parser, "eval": eval_parser, "generate": generate_parser,
    "inspect": inspect_parser, "doctor": doctor_parser,
}  # fmt: skip
INTRODUCTION = f"""# Options

Written by `{COMMAND}` from `latent_grpo/config.py` and `latent_grpo/commands`;
do not edit.

`latent-grpo train`, `sft` and `compare` take each option as a flag (`--learning_rate 1e-5`) and as a key of the YAML
file of `--config`, where flags win. In Python they are the fields of `LatentGRPOConfig` (train), `LatentSFTConfig`
(sft), `CompareConfig` (compare) and `LatentSampling` (`generate_latent`), which share the groups below. Names are TRL's
where TRL has one. The other commands have [flags alone](#flags-of-the-other-commands).
"""


def groups() -> dict[type, list[tuple[Field[Any], str]]]:
    """Every dataclass that a configuration is made of: the options that it brings or gives a new default, with their
    annotations."""
    found: dict[type, list[tuple[Field[Any], str]]] = {}
    for config in CONFIGS:
        for part in reversed(config.__mro__[:-1]):
            own = inspect.get_annotations(part)
            found.setdefault(part, [(f, str(own[f.name])) for f in fields(part) if f.name in own])
    return found


def escaped(text: str) -> str:
    """Text for a cell of a table."""
    return text.replace("|", "\\|")


def values_of(annotation: str) -> str:
    """What an option takes, as its annotation says: the choices of a Literal, else the type."""
    choices = re.fullmatch(r"Literal\[(.*)\]", annotation)
    if choices:
        return ", ".join(f"`{choice.strip()}`" for choice in choices[1].replace('"', "").replace("'", "").split(","))
    return escaped(f"`{annotation}`")


def default_of(option: Field[Any]) -> str:
    """The default as one writes it in Python."""
    value = option.default_factory() if option.default_factory is not MISSING else option.default
    return f"`{value!r}`"


def taken_by(flag: argparse.Action) -> str:
    """What a flag takes: its choices, else the type; nothing for a switch."""
    if flag.nargs == 0:
        return "nothing"
    kind = flag.type.__name__ if isinstance(flag.type, type) else "str"
    taken = ", ".join(f"`{choice}`" for choice in flag.choices or (kind,))
    return f"{taken}, one or more" if flag.nargs == "+" else taken


def flags_of(parser: argparse.ArgumentParser) -> list[str]:
    """A row of the table for every flag but --help."""
    rows = []
    for flag in parser._actions:
        if flag.dest == "help":
            continue
        names = ", ".join(f"`{name}`" for name in flag.option_strings or [flag.dest])
        default = "required" if flag.required else f"`{flag.default!r}`"
        rows.append(f"| {names} | {taken_by(flag)} | {default} | {escaped(str(flag.help))} |")
    return rows


def commands() -> list[str]:
    """The lines of the commands whose flags are no fields of a configuration."""
    lines = ["## Flags of the other commands", ""]
    for command, make in PARSERS.items():
        parser = make(f"latent-grpo {command}")
        lines += [f"### latent-grpo {command}", "", str(parser.description), ""]
        lines += ["| flag | takes | default | |", "| --- | --- | --- | --- |", *flags_of(parser), ""]
    return lines


def page() -> str:
    """The page in Markdown."""
    lines = [INTRODUCTION]
    users = {part: [config.__name__ for config in CONFIGS if issubclass(config, part)] for part in groups()}
    for part, options in groups().items():
        used_by = "" if part in CONFIGS else f" Part of {', '.join(f'`{name}`' for name in users[part])}."
        lines += [f"## {part.__name__}", "", f"{(part.__doc__ or '').strip()}{used_by}", ""]
        lines += ["| option | takes | default | |", "| --- | --- | --- | --- |"]
        for option, annotation in options:
            meaning = escaped(str(option.metadata["help"]))
            lines.append(f"| `{option.name}` | {values_of(annotation)} | {default_of(option)} | {meaning} |")
        lines.append("")
    return "\n".join([*lines, *commands()]).rstrip() + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(prog="python docs/options.py", description=__doc__)
    parser.add_argument("file", type=Path, help="Markdown file to write")
    parser.parse_args(arguments).file.write_text(page())


if __name__ == "__main__":
    main()
