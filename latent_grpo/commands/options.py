"""Parsers and flags that commands share. Flags are made from the configurations' fields, so that each is said once."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import Field, fields
from types import NoneType
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from latent_grpo.commands.from_run import say, take, take_mode
from latent_grpo.config import LatentGRPOConfig, LatentSampling, PromptOptions, check_options, default_of, groups_of
from latent_grpo.errors import ConfigError, require, unknown_key

INPUT_ERROR, FAILURE, INTERRUPTED, STOPPED = 2, 1, 130, 143
SEVERAL_PROCESSES = "Under torchrun the model is sharded and the work is split over the ranks."
# Options of `train` that commands which sample from a finished model take too.
STEP_FLAGS = (
    "method",
    "latent_top_k",
    "latent_top_p",
    "tau",
    "noise_scale",
    "noise_delta",
    "end_rule",
    "min_latent_steps",
    "max_latent_steps",
    "temperature",
    "top_p",
    "top_k",
    "seed",
)
OF_RUN = ("method", "latent_top_k", "tau")  # taken from the run that made the model
MODE = "Reason in latent or text steps. [default: as the run that made the model, else latent]"
LIMIT_FLAG = "max_completion_length"
MODEL_FLAGS = ("dtype", "device")
# Flags that every command understands, and the names of the same options in configurations.
SHORT = {"model": "model_name_or_path", "data": "dataset", "out": "output_dir"}
TRUE, FALSE = ("true", "t", "yes", "y", "on", "1"), ("false", "f", "no", "n", "off", "0")


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors that suggest the nearest flag, and without abbreviations."""

    def __init__(self, **options: Any) -> None:
        # An abbreviation that works today means another flag once a longer one is added.
        super().__init__(allow_abbrev=False, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse words, with `--learning-rate` as another spelling of `--learning_rate`, and the names of SHORT."""
        words = [self.spelled(word) for word in (sys.argv[1:] if args is None else args)]
        return super().parse_known_args(words, namespace)

    def spelled(self, word: str) -> str:
        """Return a flag in the spelling that the command has, and any other word as it is."""
        flag, mark, value = word.partition("=")
        known = self._option_string_actions
        if not flag.startswith("--") or flag in known:
            return word
        name = flag[2:].replace("-", "_")
        names = (name, *(other for pair in SHORT.items() if name in pair for other in pair))
        spelled = next((f"--{other}" for other in names if f"--{other}" in known), None)
        return f"{spelled}{mark}{value}" if spelled else word

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with code 2."""
        unknown = [word for word in message.split() if word.startswith("--")]
        if message.startswith("unrecognized arguments") and unknown:
            known = [flag.lstrip("-") for action in self._actions for flag in action.option_strings]
            message = unknown_key(unknown[0].split("=")[0].lstrip("-"), known)
        # Every process of torchrun has the same arguments.
        line = f"{self.prog}: {message} (see {self.prog} --help)\n" if os.environ.get("RANK", "0") == "0" else None
        self.exit(INPUT_ERROR, line)


class PrintVersion(argparse.Action):
    """Print the version. argparse's own action would import PyTorch for it at every start."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from latent_kernels import __version__

        print(parser.prog, __version__)
        parser.exit(0)


def boolean(text: str) -> bool:
    """Return the truth value that a text stands for."""
    if text.lower() in TRUE + FALSE:
        return text.lower() in TRUE
    raise argparse.ArgumentTypeError(f"give true or false, not {text!r}")


def mapping(text: str) -> dict[str, Any]:
    """Return the mapping that a text of JSON stands for."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"give a JSON mapping, as '{{\"name\": 1}}', not {text!r}")
    return value


def or_null(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a converter that also takes `null`, for numbers that may be None."""

    def convert(text: str) -> Any:
        return None if text == "null" else kind(text)

    convert.__name__ = getattr(kind, "__name__", "value")  # argparse names the type in its message
    return convert


def flag_settings(kind: Any) -> dict[str, Any]:
    """Return the settings of `add_argument` for an option annotated with `kind`."""
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind)}
    if kind is bool:
        return {"type": boolean, "nargs": "?", "const": True, "metavar": "BOOL"}
    if NoneType in get_args(kind):
        (inner,) = (flag_settings(part) for part in get_args(kind) if part is not NoneType)
        # In a text `null` may be a name, and in a list it would be an item.
        is_number = inner.get("type") in (int, float) and "nargs" not in inner
        return {**inner, "type": or_null(inner["type"])} if is_number else inner
    if get_origin(kind) is list:
        return {**flag_settings(get_args(kind)[0]), "nargs": "+"}
    if get_origin(kind) is dict:
        return {"type": mapping, "metavar": "JSON"}
    return {"type": kind, "metavar": kind.__name__.upper()}


def help_of(item: Field[Any]) -> str:
    """Return the meaning of an option with its range and default."""
    allowed, default = item.metadata["range"], default_of(item)
    facts = [str(allowed)] if allowed is not None else []
    facts += [f"default: {default}"] if default not in (None, "", []) else []
    facts += [f"also --{short}" for short, name in SHORT.items() if name == item.name]
    text = item.metadata["help"] + (f" [{'; '.join(facts)}]" if facts else "")
    return text.replace("%", "%%")  # argparse formats help texts


def add_flags(target: Any, config_class: type, items: Iterable[Field[Any]]) -> None:
    """Add a flag per option to a parser or a group of it. An option that is on by default gets a `--no_` flag too."""
    kinds = get_type_hints(config_class)
    for item in items:
        name, default = item.name, default_of(item)
        settings = flag_settings(kinds[name])
        if default == []:
            settings["nargs"] = "*"  # so that a flag can empty the list of a configuration file
        target.add_argument(f"--{name}", default=default, help=help_of(item), **settings)
        if kinds[name] is bool and default:
            off = f"Same as --{name} false."
            target.add_argument(f"--no_{name}", dest=name, action="store_false", default=default, help=off)


def add_flags_named(target: Any, names: Sequence[str]) -> None:
    """Add the flags of some of `train`'s options."""
    known = {item.name: item for item in fields(LatentGRPOConfig)}
    add_flags(target, LatentGRPOConfig, [known[name] for name in names])


def config_parser(prog: str, config_class: type, description: str) -> Parser:
    """Return a parser with a flag per option of a configuration, in the configuration's groups, and --config."""
    # argparse's own usage line would name 80 flags before the first word of help.
    parser = Parser(prog=prog, usage=f"{prog} [--config FILE ...] [--OPTION VALUE ...]", description=description)
    parser.add_argument(
        "--config",
        action="append",
        metavar="FILE",
        help="YAML file of options, or the name of a recipe. Given twice, the later wins. Flags override both.",
    )
    for part, items in groups_of(config_class):
        title = (part.__doc__ or "").strip().splitlines()[0].rstrip(".")
        add_flags(parser.add_argument_group(title), config_class, items)
    return parser


def parse_config(prog: str, config_class: type, description: str, argv: Sequence[str]) -> Any:
    """Return the configuration that --config files and flags describe."""
    from latent_grpo.recipes.read import read_yaml

    parser = config_parser(prog, config_class, description)
    kept = {item.name: default_of(item) for item in fields(config_class)}
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", action="append", default=[])
    for path in first.parse_known_args(argv)[0].config:
        # Numbers go through the flag's own conversion as text, because YAML reads 1e-6 as text.
        values = read_yaml(path, config_class)
        numbers = {k: str(v) for k, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        parser.set_defaults(**{**values, **numbers})
    named = {name for path in first.parse_known_args(argv)[0].config for name in read_yaml(path, config_class)}
    own = [name for name in OF_RUN if name in kept and name not in named]
    parser.set_defaults(**dict.fromkeys(own))
    namespace = parser.parse_args(argv)
    if own:
        say(take(namespace, namespace.model_name_or_path or "", own, {name: kept[name] for name in own}))
    return config_class(**{item.name: getattr(namespace, item.name) for item in fields(config_class)})


def complete_sampling(args: argparse.Namespace) -> None:
    """Set the flags of `sampling_flags` that were not given, from the run that made the model or to their defaults."""
    notes = take_mode(args)
    notes += take(args, args.model, OF_RUN, {name: getattr(LatentSampling(), name) for name in OF_RUN})
    args.notes = notes  # said once the model is loaded: a mistake is answered in one line


def load_dataset_rows(args: Any, source: str, split: str, limit: int | None) -> list[dict[str, Any]]:
    """Return the rows of `source`, which is not the training data, with the columns that `args` names."""
    from latent_grpo.data.rows import load_rows

    columns = {f"{name}_column": getattr(args, f"{name}_column") for name in ("prompt", "answer", "chain")}
    return load_rows(source, split=split, limit=limit, **columns)


def require_given(**values: Any) -> None:
    """Raise ConfigError that names the first option that was left empty."""
    for name, value in values.items():
        if not value:
            raise ConfigError(f"{name} is not given; set --{name} or put it into the --config file")


def source_of(text: str) -> str:
    """Return the source of `LABEL=SOURCE`, or a source without a label as it is."""
    label, mark, source = text.partition("=")
    # A "=" behind a folder or a dot belongs to the path of a file.
    return source if mark and label and source and not set("/\\.") & set(label) else text


def require_sources(*sources: str | None) -> None:
    """Raise DataError if one of the data sources is a file that does not exist. It takes no time, unlike imports."""
    from latent_grpo.data.files import check_source

    for source in filter(None, sources):
        check_source(source)


def sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of commands that sample from a finished model."""
    parser.add_argument("--model", required=True, metavar="STR", help="Model folder or Hub name.")
    parser.add_argument("--mode", choices=("latent", "text"), help=MODE)
    add_flags_named(parser.add_argument_group("How a response is sampled"), (*STEP_FLAGS, LIMIT_FLAG))
    add_flags_named(parser.add_argument_group("Which model is used, in what precision, on what device"), MODEL_FLAGS)
    prompt_flags(parser)
    parser.set_defaults(**dict.fromkeys(OF_RUN))  # None: not given


def prompt_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the prompt format."""
    (group,) = (part for part, _ in groups_of(PromptOptions))
    target = parser.add_argument_group((group.__doc__ or "").partition(".")[0])
    add_flags(target, PromptOptions, fields(PromptOptions))


def prompt_options(args: argparse.Namespace) -> PromptOptions:
    """Return the options of `prompt_flags`, checked."""
    options = PromptOptions(**{item.name: getattr(args, item.name) for item in fields(PromptOptions)})
    check_options(options)
    return options


def load_for_sampling(args: argparse.Namespace) -> tuple[Any, Any, Any, Any]:
    """Return model, tokenizer, sampling options and prompt format for the flags of `sampling_flags`."""
    from latent_grpo.decoding_proof import check_decoding
    from latent_grpo.model import (
        check_vocabulary,
        end_marker_ids,
        eos_ids,
        lm_head,
        load_model,
        load_tokenizer,
        precision_line,
    )
    from latent_grpo.parallel.process_group import rank
    from latent_grpo.prompts import resolve_format

    if "notes" not in args:
        complete_sampling(args)
    latent, limit = args.mode == "latent", args.max_completion_length
    require(limit >= 1, LIMIT_FLAG, limit, "give 1 or more")
    given = {name: getattr(args, name) for name in (*STEP_FLAGS, "noise") if name in args}  # only eval has --noise
    sampling = LatentSampling(latent=latent, max_new_tokens=limit, **given)
    sampling.check()  # before the model is loaded, which takes longer
    tokenizer = load_tokenizer(args.model)
    prompt_format = resolve_format(prompt_options(args), args.model)
    sampling.end_token_id = end_marker_ids(tokenizer, prompt_format.end_marker)[0] if latent else None
    if rank() == 0:
        print(precision_line(args.model, args.dtype, args.device))
    model = load_model(args.model, args.dtype, args.device)
    check_decoding(model)
    check_vocabulary(model, tokenizer, prompt_format, latent)
    sampling.eos_token_id = eos_ids(model, tokenizer)
    vocab = len(lm_head(model))
    require(args.latent_top_k <= vocab, "latent_top_k", args.latent_top_k, f"the vocabulary has {vocab} tokens")
    say(args.notes)
    return model, tokenizer, sampling, prompt_format
