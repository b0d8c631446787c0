"""Parsers and flags that commands share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NoReturn

INPUT_ERROR, FAILURE, INTERRUPTED = 2, 1, 130


SEVERAL_PROCESSES = "Under torchrun the model is sharded and the work split over the ranks."


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors that suggest the nearest flag."""

    def error(self: argparse.ArgumentParser, message: str) -> NoReturn:
        """Print one line and exit with code 2."""
        unknown = [word for word in message.split() if word.startswith("--")]
        if message.startswith("unrecognized arguments") and unknown:
            from latent_grpo.config import unknown_key

            known = [flag.lstrip("-") for action in self._actions for flag in action.option_strings]
            message = unknown_key(unknown[0].split("=")[0].lstrip("-"), known)
        self.exit(INPUT_ERROR, f"{self.prog}: {message} (see {self.prog} --help)\n")


class PrintVersion(argparse.Action):
    """Print the version; argparse's own action would import PyTorch for it at every start."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from latent_kernels import __version__

        print(parser.prog, __version__)
        parser.exit(0)


def config_parser(prog: str, config_class: type, description: str) -> Any:
    """A parser with a flag for every field of a configuration dataclass, and --config."""
    from transformers import HfArgumentParser

    class ConfigParser(HfArgumentParser):
        """transformers' dataclass parser with our one-line errors."""

        error = Parser.error

    parser = ConfigParser(
        config_class, prog=prog, description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument(
        "--config", action="append",
        help="YAML file of options, or the name of a recipe; given twice, the later wins; flags override both.",
    )  # fmt: skip
    return parser


def parse_config(prog: str, config_class: type, description: str, argv: Sequence[str]) -> Any:
    """A configuration from --config and flags."""
    from latent_grpo.config import read_yaml

    parser = config_parser(prog, config_class, description)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", action="append", default=[])
    for path in first.parse_known_args(argv)[0].config:
        # Strings go through the flag's own conversion, since YAML reads 1e-6 as one.
        values = read_yaml(path, config_class)
        numbers = {k: str(v) for k, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        parser.set_defaults(**{**values, **numbers})
    namespace = parser.parse_args(argv)
    return config_class(**{f.name: getattr(namespace, f.name) for f in fields(config_class)})


def load_dataset_rows(args: Any, source: str, split: str, limit: int | None) -> list[dict[str, Any]]:
    """Rows of `source` with the columns that `args` names."""
    from latent_grpo.data.rows import load_rows

    return load_rows(
        source, split=split, prompt_column=args.prompt_column, answer_column=args.answer_column,
        chain_column=args.chain_column, limit=limit,
    )  # fmt: skip


def require_given(prog: str, **values: Any) -> None:
    """ConfigError naming the first option that was left empty."""
    from latent_grpo.config import ConfigError

    for name, value in values.items():
        if not value:
            raise ConfigError(f"{name} is not given; set --{name} or put it into the --config file")


def sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of commands that sample from a finished model."""
    parser.add_argument("--model", required=True, help="model folder or Hub name")
    parser.add_argument("--mode", choices=("latent", "text"), default="latent", help="reason in latent or text steps")
    parser.add_argument("--latent_top_k", type=int, default=10, help="mixture size K")
    parser.add_argument("--latent_top_p", type=float, default=0.95, help="nucleus mass of latent candidates")
    parser.add_argument("--tau", type=float, default=1.0, help="Gumbel-softmax temperature")
    parser.add_argument("--noise_scale", type=float, default=1.0, help="factor on the noise")
    parser.add_argument("--temperature", type=float, default=0.6, help="temperature of text tokens where sampled")
    parser.add_argument("--top_p", type=float, default=0.95, help="nucleus mass of text tokens where sampled")
    parser.add_argument("--top_k", type=int, default=30, help="candidates of text tokens where sampled; 0 is all")
    parser.add_argument("--max_completion_length", type=int, default=128, help="limit of a response")
    parser.add_argument("--end_marker", default="</think>", help="text whose first token ends a latent run")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="precision")
    parser.add_argument("--device", default=None, help="device; default: the GPU if there is one")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise")


def load_for_sampling(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Model, tokenizer and sampling options from `sampling_flags`."""
    from latent_grpo.config import LatentSampling, require
    from latent_grpo.model import end_marker_ids, eos_ids, lm_head, load_model, load_tokenizer

    require(args.max_completion_length >= 1, "max_completion_length", args.max_completion_length, "give 1 or more")
    tokenizer = load_tokenizer(args.model)
    latent = args.mode == "latent"
    end = end_marker_ids(tokenizer, args.end_marker)[0] if latent else None
    model = load_model(args.model, args.dtype, args.device)
    sampling = LatentSampling(
        latent=latent, latent_top_k=args.latent_top_k, latent_top_p=args.latent_top_p, tau=args.tau,
        noise_scale=args.noise_scale, temperature=args.temperature, top_p=args.top_p, top_k=args.top_k,
        max_new_tokens=args.max_completion_length, end_token_id=end, eos_token_id=eos_ids(model, tokenizer),
        seed=args.seed,
    )  # fmt: skip
    sampling.check()
    vocab = len(lm_head(model))
    require(args.latent_top_k <= vocab, "latent_top_k", args.latent_top_k, f"the vocabulary has {vocab} tokens")
    return model, tokenizer, sampling
