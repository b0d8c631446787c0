"""The command line: `latent-grpo COMMAND`, or `python -m latent_grpo COMMAND`.

Exit codes: 0 done, 1 a failure while running, 2 bad arguments or input (one line), 130 interrupted.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence

from latent_grpo.commands.compare import command_compare
from latent_grpo.commands.doctor import command_doctor
from latent_grpo.commands.evaluate import command_eval
from latent_grpo.commands.generate import command_generate
from latent_grpo.commands.inspect import command_inspect
from latent_grpo.commands.options import (
    FAILURE,
    INPUT_ERROR,
    INTERRUPTED,
    Parser,
    PrintVersion,
)
from latent_grpo.commands.quickstart import command_quickstart
from latent_grpo.commands.train import command_sft, command_train

COMMANDS: dict[str, Callable[[str, Sequence[str]], int]] = {
    "quickstart": command_quickstart,
    "sft": command_sft,
    "train": command_train,
    "eval": command_eval,
    "generate": command_generate,
    "inspect": command_inspect,
    "compare": command_compare,
    "doctor": command_doctor,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    listing = "\n".join(f"  {name:<11} {(run.__doc__ or '').splitlines()[0]}" for name, run in COMMANDS.items())
    parser = Parser(
        prog="latent-grpo", description="Latent reasoning with reinforcement learning (arXiv 2604.27998).",
        epilog=f"commands:\n{listing}\n\n`latent-grpo COMMAND --help` documents every flag.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action=PrintVersion, nargs=0, help="print the version and exit")
    parser.add_argument("command", metavar="COMMAND", help="one of the commands below")
    command = parser.parse_args(argv[:1]).command
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"one of {', '.join(COMMANDS)}"
        parser.error(f"unknown command {command!r}; {remedy}")
    try:
        return COMMANDS[command](f"latent-grpo {command}", argv[1:])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, TypeError) as error:
        if not is_input_error(error):
            raise
        print(f"latent-grpo {command}: {error}", file=sys.stderr)
        return INPUT_ERROR
    except Exception as error:
        from latent_grpo.rewards.scoring import RewardError

        if not isinstance(error, RewardError):
            raise
        print(f"latent-grpo {command}: {error}", file=sys.stderr)
        return FAILURE


def is_input_error(error: Exception) -> bool:
    """Whether an error is about what the user gave, and so worth one line instead of a traceback."""
    from latent_grpo.config import ConfigError
    from latent_grpo.data.rows import DataError
    from latent_grpo.model import ModelError

    return isinstance(error, ConfigError | DataError | ModelError)
