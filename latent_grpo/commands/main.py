"""The command line: `latent-grpo COMMAND`, or `python -m latent_grpo COMMAND`.

Exit codes: 0 done, 1 a failure while running, 2 bad arguments or input (one line), 130 interrupted, 143 stopped by
another signal or the wall clock.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from latent_grpo.commands.options import FAILURE, INPUT_ERROR, INTERRUPTED, STOPPED, Parser, PrintVersion
from latent_grpo.errors import ConfigError, DataError, ModelError, RewardError, SaveError, TrainingError, first_line

# Command, its module in this folder, what it does. A module is imported when its command runs, because most of them
# import PyTorch, and `--help` and typing mistakes should answer at once.
COMMANDS = {
    "quickstart": ("quickstart", "Run the whole job on a made-up task: minutes on a CPU."),
    "encode": ("encode", "Make soft labels for sft: the first stage of Latent-SFT."),
    "sft": ("sft", "Warm a model up: with uniform targets, or with soft labels (Latent-SFT)."),
    "train": ("train", "Train with Latent-GRPO, or with text GRPO (--latent False)."),
    "eval": ("evaluate", "Measure Pass@1, pass@k and reasoning steps on benchmarks, files or Hub data."),
    "generate": ("generate", "Answer one prompt and show every latent step as its mixture."),
    "inspect": ("inspect", "Show curves, alarms and responses of a run."),
    "compare": ("compare", "Compare methods and ablations over several seeds: one table, one figure."),
    "probes": ("probes", "Test each mechanism of the method in a small experiment with a prediction."),
    "doctor": ("doctor", "Check the environment and a model, or predict the memory of training (--plan)."),
}

TRACEBACK = "LATENT_GRPO_TRACEBACK"  # environment variable


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command = main_parser().parse_args(argv[:1]).command
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"one of {', '.join(COMMANDS)}"
        main_parser().error(f"unknown command {command!r}; {remedy}")
    prog = f"latent-grpo {command}"
    with warnings_in_one_line():
        return run_command(command, prog, argv[1:])


def run_command(command: str, prog: str, argv: Sequence[str]) -> int:
    """Run a command and return its exit code. An error that one line explains is printed without a traceback."""
    try:
        module = importlib.import_module(f"latent_grpo.commands.{COMMANDS[command][0]}")
        return int(module.run(prog, argv))
    except KeyboardInterrupt as stop:
        plain = type(stop) is KeyboardInterrupt
        return end_together(INTERRUPTED if plain else STOPPED, str(stop) or "interrupted")
    except Exception as error:
        known = exit_code(error)
        if known is None and not several_processes():
            raise
        message = None if known is None else f"{prog}: {error}"
        if message is not None and isinstance(error, RewardError) and error.__cause__ is not None:
            shown = os.environ.get(TRACEBACK)  # of the user's own code
            message = (
                f"{traceback.format_exc()}{message}" if shown else f"{message} ({TRACEBACK}=1 shows its traceback)"
            )
        return end_together(known or FAILURE, message)


def several_processes() -> bool:
    """Return whether torchrun has started this process beside others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def end_together(code: int, message: str | None) -> int:
    """Print a message, or the traceback of the error at hand, and return the exit code.

    Of the processes of torchrun, only the first to end with an error prints, and all end with its code.
    """
    first = True
    if several_processes():
        from latent_grpo.parallel.heartbeat import first_to_end

        first, code = first_to_end(code)
        error = sys.exc_info()[1]
        if message is None and any(word in str(error) for word in ("gloo", "NCCL", "Connection")):
            message = f"another process of the run has ended: {first_line(error)}" if error else None
    if first:
        print(traceback.format_exc() if message is None else message, file=sys.stderr, flush=True)
    if several_processes() and sys.modules["torch.distributed"].is_initialized():
        # The workers of the process group do not survive the end of the interpreter, which would abort.
        sys.stdout.flush()
        os._exit(code)
    return code


@contextmanager
def warnings_in_one_line() -> Iterator[None]:
    """Print Python warnings as `warning: MESSAGE`, without the place in the code that raised them."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"warning: {' '.join(str(message).split())}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


def main_parser() -> Parser:
    """Return the parser of the command's name."""
    listing = "\n".join(f"  {name:<11} {summary}" for name, (_, summary) in COMMANDS.items())
    parser = Parser(
        prog="latent-grpo",
        description="Latent reasoning with reinforcement learning (arXiv 2604.27998).",
        epilog=f"commands:\n{listing}\n\n`latent-grpo COMMAND --help` documents every flag.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=PrintVersion, nargs=0, help="Print the version and exit.")
    parser.add_argument("command", metavar="COMMAND", help="One of the commands below.")
    return parser


def exit_code(error: Exception) -> int | None:
    """Return the exit code of an error that one line explains. None for an error that needs its traceback."""
    if isinstance(error, ConfigError | DataError | ModelError):
        return INPUT_ERROR
    return FAILURE if isinstance(error, RewardError | SaveError | TrainingError) else None
