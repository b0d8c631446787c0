"""Which folders are runs. This module imports nothing that takes time, so that a mistyped path is answered at once."""

from __future__ import annotations

from pathlib import Path

from latent_grpo.errors import ConfigError


def check_run(run: Path) -> None:
    """Raise ConfigError unless a folder holds the metrics of a run."""
    if not (run / "metrics.jsonl").is_file():
        raise ConfigError(f"{str(run)!r} is not a run: it has no metrics.jsonl; give the output_dir of sft or train")
