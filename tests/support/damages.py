"""Damages of a checkpoint, drawn at random: what disks, copies, people and attackers do to files.

`python -m support.damages --count 200 --seed 1` damages the newer of two checkpoints over and over, resumes, and prints
counts by kind of damage as JSON. Run it in the folder `tests` with the repository on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latent_grpo.errors import ConfigError, ModelError, TrainingError
from latent_grpo.saving.integrity import with_checksums
from support.killed_runs import metrics_of, random_reward
from support.small_runs import grpo

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
FORGED = ("forged tensors", "forged state", "forged model", "forged code")  # with checksums that match
AUTO_EVERY = 9  # damages, after one of which a run goes on with "auto"


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
        name = rng.choice(sorted(state[key]))
        state[key][name] = rng.choice([value for value in (0, "x", None, [], {}) if value != state[key][name]])
    else:
        state[key] = rng.choice([value for value in (0, "x", None, [], {}, [{}]) if value != state[key]])
    path.write_text(text[: rng.randrange(len(text) - 1)] if kind == "cut state" else json.dumps(state))
    return path.name


def forge(kind: str, folder: Path, rng: random.Random) -> None:
    """Change a checkpoint as one of FORGED, and write checksums that match, as only somebody does who wants to."""
    path = folder / STATE_FILE
    state = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("files", "sha256", "state_sha256")}
    if kind == "forged code":
        target = rng.choice(("trainer_state.pt", "pytorch_model.bin", "own.py", "tokenizer.json", "config.json"))
        (folder / target).write_bytes(pickle.dumps(_Code(folder.parent / "ran")))
    elif kind == "forged state":
        key = rng.choice(sorted(state.keys() - {"step"}))
        state[key] = rng.choice((0, -1, "x", None, [], {}, [{}], [None], {"x": 1}, 10**400, float("inf")))
    else:
        small = folder / "trainer_state.pt"
        files = [small] if kind == "forged tensors" else sorted(p for p in folder.rglob("*") if p.is_file())
        target = rng.choice([p for p in files if p.name != STATE_FILE and p.stat().st_size])
        content = bytearray(target.read_bytes())
        for _ in range(rng.randrange(1, 20)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        target.write_bytes(content)
    path.unlink()
    path.write_text(json.dumps(with_checksums(folder, state)))


def trainer(out: Path, **options: Any) -> Any:
    """Return a trainer of two steps that change the weights."""
    return grpo(out, reward=random_reward, learning_rate=1e-3, log_table=False, **options)


class Damages:
    """A finished run of two checkpoints, and copies of it that are damaged and resumed."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.finished, self.run, self.rng = folder / "finished", folder / "run", random.Random(seed)
        self.marker = self.run / "ran"  # code in a hostile file would write it
        self.counts: Counter[str] = Counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer(self.finished).train()

    def fresh(self) -> Path:
        """Return the newer checkpoint of a fresh copy of the run."""
        shutil.rmtree(self.run, ignore_errors=True)
        shutil.copytree(self.finished, self.run)
        return self.run / "checkpoint-2"

    def resume(self, choice: str, **options: Any) -> str | None:
        """Resume the run. Return the line of the package's error, or None if the run went on to its end."""
        try:
            trainer(self.run, **options).train(resume_from_checkpoint=choice)
        except (ConfigError, ModelError, TrainingError) as error:
            if "\n" in str(error):
                raise
            return str(error)
        return None

    def refused(self, number: int) -> None:
        """Damage a checkpoint. It must be refused in one line that names the file and the good checkpoint."""
        kind, folder = KINDS[number % len(KINDS)], self.fresh()
        name = damage(kind, folder, self.finished / "checkpoint-1", self.rng)
        message = self.resume(str(folder))
        assert message is not None, f"{kind} of {name}: resumed"
        assert name in message, (kind, name, message)
        assert message.endswith("checkpoint-1'"), (kind, name, message)
        assert not self.marker.exists(), (kind, name)
        self.counts[kind] += 1
        if number % AUTO_EVERY == 0:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                assert self.resume("auto") is None
            assert any("checkpoint-2" in str(w.message) for w in caught), (kind, name)
            assert metrics_of(self.run) == metrics_of(self.finished), (kind, name)
            weights = "model.safetensors"
            assert (self.run / weights).read_bytes() == (self.finished / weights).read_bytes(), (kind, name)
            self.counts["went on from the checkpoint before, to the same end"] += 1

    def forged(self, number: int) -> None:
        """Forge a checkpoint. It may be resumed, for checksums are no signature, but it runs no code."""
        kind = FORGED[number % len(FORGED)]
        folder = self.fresh()
        forge(kind, folder, self.rng)
        self.counts[f"{kind}: {'resumed' if self.resume(str(folder), max_steps=3) is None else 'refused'}"] += 1
        assert not self.marker.exists(), kind


def main(argv: Sequence[str] | None = None) -> None:
    """Make and resume the damages that the arguments ask for, and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200, help="Damages.")
    parser.add_argument("--forged", type=int, default=0, help="Changes with checksums that match, besides.")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        damages = Damages(Path(folder), args.seed)
        for number in range(args.count):
            damages.refused(number)
        for number in range(args.forged):
            damages.forged(number)
    print(json.dumps({"damages": args.count, "forged": args.forged, **damages.counts}))


if __name__ == "__main__":
    main()
