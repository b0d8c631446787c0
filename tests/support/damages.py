"""Damages of a checkpoint, drawn at random: what disks, copies, people and attackers do to files."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

STATE_FILE = "trainer_state.json"
KINDS = (
    "flip",
    "truncate",
    "extend",
    "zero",
    "delete",
    "exchange",
    "swap",
    "symlink",
    "link folder",
    "edit state",
    "drop key",
    "add",
    "pickle",
    "cut state",
    "half deleted",
    "rename",
)


class _Code:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


def damage(kind: str, folder: Path, other: Path, rng: random.Random) -> str:
    """Damage a checkpoint in one of KINDS. Return what an error must name. other: a checkpoint of another step."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = rng.choice([path for path in files if path.stat().st_size])
    name = str(path.relative_to(folder))
    content = bytearray(path.read_bytes())
    if kind == "flip":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
    elif kind == "truncate":
        path.write_bytes(content[: rng.randrange(len(content))])
    elif kind == "extend":
        path.write_bytes(content + bytes(rng.randrange(1, 4096)))
    elif kind == "zero":
        start = rng.randrange(len(content))
        while not any(content[start:]):
            start = rng.randrange(len(content))
        path.write_bytes(content[:start] + bytes(len(content) - start))
    elif kind == "delete":
        path.unlink()
    elif kind == "exchange":
        changed = [p for p in files if p.read_bytes() != (other / p.relative_to(folder)).read_bytes()]
        path = rng.choice([p for p in changed if p.name != STATE_FILE])
        shutil.copyfile(other / path.relative_to(folder), path)
        name = str(path.relative_to(folder))
    elif kind == "swap":
        shutil.rmtree(folder)
        shutil.copytree(other, folder)
        name = STATE_FILE
    elif kind == "symlink":
        target = folder.parent / "elsewhere"
        shutil.copyfile(path, target)
        path.unlink()
        path.symlink_to(target)
    elif kind == "link folder":
        shutil.copytree(folder / "optimizer", folder.parent / "optimizer", dirs_exist_ok=True)
        shutil.rmtree(folder / "optimizer")
        (folder / "optimizer").symlink_to(folder.parent / "optimizer")
        name = "optimizer"
    elif kind in ("edit state", "drop key", "cut state"):
        name = _damage_state(kind, folder / STATE_FILE, rng)
    elif kind == "add":
        name = f"optimizer/shard-{rng.randrange(10**5):05d}-model-00002-of-00002.safetensors"
        shutil.copyfile(rng.choice(sorted((folder / "optimizer").iterdir())), folder / name)
    elif kind == "pickle":
        name = rng.choice(("trainer_state.pt", "pytorch_model.bin", "training_args.bin"))
        (folder / name).write_bytes(pickle.dumps(_Code(folder.parent / "ran")))
    elif kind == "half deleted":
        for gone in rng.sample(files, len(files) // 2):
            gone.unlink()
        name = ""
    else:
        os.replace(path, path.with_name(path.name + "_"))
    return name


def _damage_state(kind: str, path: Path, rng: random.Random) -> str:
    text = path.read_text()
    state = json.loads(text)
    key = rng.choice(sorted(state.keys() - {"step", "state_sha256", "sha256"}))
    if kind == "drop key":
        del state[key]
    elif isinstance(state[key], dict):
        state[key][rng.choice(sorted(state[key]))] = rng.choice((0, "x", None, [], {}))
    else:
        state[key] = rng.choice((0, "x", None, [], {}, [{}]))
    path.write_text(text[: rng.randrange(len(text) - 1)] if kind == "cut state" else json.dumps(state))
    return path.name
