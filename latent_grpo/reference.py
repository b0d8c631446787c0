"""The page of all options, from the configuration's own documentation: `python -m latent_grpo.reference FILE`."""

from __future__ import annotations

import argparse
import inspect
import re
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from latent_grpo.config import CompareConfig, LatentGRPOConfig, LatentSampling, LatentSFTConfig

COMMAND = "python -m latent_grpo.reference docs/options.md"
CONFIGS = (LatentGRPOConfig, LatentSFTConfig, LatentSampling, CompareConfig)
INTRODUCTION = f"""# Options

Written by `{COMMAND}` from `latent_grpo/config.py`; do not edit.

`latent-grpo train`, `sft` and `compare` take each option as a flag (`--learning_rate 1e-5`) and as a key of the YAML
file of `--config`, where flags win. In Python they are the fields of `LatentGRPOConfig` (train), `LatentSFTConfig`
(sft), `CompareConfig` (compare) and `LatentSampling` (`generate_latent`), which share the groups below. Names are TRL's
where TRL has one.
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


def values_of(annotation: str) -> str:
    """What an option takes, as its annotation says: the choices of a Literal, else the type."""
    choices = re.fullmatch(r"Literal\[(.*)\]", annotation)
    if choices:
        return ", ".join(f"`{choice.strip()}`" for choice in choices[1].replace('"', "").replace("'", "").split(","))
    return f"`{annotation}`".replace("|", "\\|")


def default_of(option: Field[Any]) -> str:
    """The default as one writes it in Python."""
    value = option.default_factory() if option.default_factory is not MISSING else option.default
    return f"`{value!r}`"


def page() -> str:
    """The page in Markdown."""
    lines = [INTRODUCTION]
    users = {part: [config.__name__ for config in CONFIGS if issubclass(config, part)] for part in groups()}
    for part, options in groups().items():
        used_by = "" if part in CONFIGS else f" Part of {', '.join(f'`{name}`' for name in users[part])}."
        lines += [f"## {part.__name__}", "", f"{(part.__doc__ or '').strip()}{used_by}", ""]
        lines += ["| option | takes | default | |", "| --- | --- | --- | --- |"]
        for option, annotation in options:
            meaning = str(option.metadata["help"]).replace("|", "\\|")
            lines.append(f"| `{option.name}` | {values_of(annotation)} | {default_of(option)} | {meaning} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(prog="python -m latent_grpo.reference", description=__doc__)
    parser.add_argument("file", type=Path, help="Markdown file to write")
    parser.parse_args(arguments).file.write_text(page())


if __name__ == "__main__":
    main()
