"""`run.json`, beside the weights of a run: how it was made, for people and for the commands that use the model next."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from latent_grpo.config import RunOptions
from latent_grpo.saving.atomic_files import write_whole
from latent_grpo.saving.run_identity import fingerprint
from latent_kernels import __version__

RECORD = "run.json"


def write_record(folder: Path, kind: str, args: RunOptions, rows: Sequence[Any]) -> None:
    """Write command, options, versions and a fingerprint of the training data into a run's folder.

    kind: the training phase, "train" or "sft".
    """
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    record = {
        "phase": kind,
        "command": shlex.join(sys.argv),
        "options": asdict(args),
        "data": fingerprint(rows),
        "versions": {"latent_grpo": __version__, "python": platform.python_version(), **versions},
    }
    write_whole(folder / RECORD, json.dumps(record, indent=1) + "\n")
