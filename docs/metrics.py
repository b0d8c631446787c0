"""Write the page of metrics: `python docs/metrics.py docs/metrics.md`."""

from __future__ import annotations

import argparse
from pathlib import Path

from latent_grpo.watching.names import METRICS, OLD_NAMES

TEXT = """# Metrics

Every metric of a run, written by `python docs/metrics.py docs/metrics.md`. A run writes them to `metrics.jsonl` at
every logged step, and to the trackers of `--report_to`: `train/reward`, `eval/pass_at_1` and so on. A name of TRL means
what it means in TRL's `GRPOTrainer`. Names under `latent/` are of latent steps; a run of text has none of them. A step
of `train` is one rollout with all its updates. Reward functions add metrics of their own with `log_metric`.

| metric | logged by | TRL's | |
| --- | --- | --- | --- |
"""
OLD = """
## Names of earlier versions

`inspect`, `compare` and the figures read logs of earlier versions under the new names. There `reward_std` was the
mean of the deviations within groups.

| earlier | now |
| --- | --- |
"""


def page() -> str:
    """Return the page in Markdown."""
    rows = [f"| `{name}` | {m.phases} | {'yes' if m.trl else ''} | {m.meaning} |\n" for name, m in METRICS.items()]
    return TEXT + "".join(rows) + OLD + "".join(f"| `{old}` | `{new}` |\n" for old, new in OLD_NAMES.items())


def main(arguments: list[str] | None = None) -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(prog="python docs/metrics.py", description=__doc__)
    parser.add_argument("file", type=Path, help="Markdown file to write")
    parser.parse_args(arguments).file.write_text(page())


if __name__ == "__main__":
    main()
