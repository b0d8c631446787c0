"""The entry point of `latent-grpo` and `python -m latent_grpo`."""

import sys

from latent_grpo.commands.main import main


def run() -> None:
    """Exit with the command's code."""
    sys.exit(main())


if __name__ == "__main__":
    run()
