"""Read options from a YAML file or a named recipe."""

from __future__ import annotations

from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from latent_grpo.errors import ConfigError, unknown_key


def read_yaml(path: str, config_class: type) -> dict[str, Any]:
    """Read options from a YAML file or a named recipe. Raise ConfigError for unknown keys and files without options."""
    named = resources.files("latent_grpo.recipes") / f"{path}.yaml"
    try:
        text = named.read_text() if named.is_file() and not Path(path).exists() else Path(path).read_text("utf-8")
        values = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        kind = error.__class__.__name__
        raise ConfigError(f"cannot read the config {path!r}: {kind}; recipes: {recipes()}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of options, got {type(values).__name__}")
    known = [item.name for item in fields(config_class)]
    for key in values:
        if key not in known:
            raise ConfigError(f"{path}: {unknown_key(str(key), known)}")
    return values


def recipes() -> str:
    """Return the names of the shipped recipes."""
    folder = resources.files("latent_grpo.recipes")
    return ", ".join(sorted(path.name[:-5] for path in folder.iterdir() if path.name.endswith(".yaml")))
