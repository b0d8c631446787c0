"""Commands of `latent-grpo` that tests run in their own process."""

from __future__ import annotations

from collections.abc import Sequence

from latent_grpo.commands.main import main


def exit_code(words: Sequence[str]) -> int | str | None:
    """Return the exit code of `latent-grpo WORDS`, whether argparse or the command ends it."""
    try:
        return main(words)
    except SystemExit as stop:
        return stop.code
