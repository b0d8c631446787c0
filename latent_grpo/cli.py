"""The command line: `latent-grpo COMMAND`, or `python -m latent_grpo COMMAND`.

Exit codes: 0 done, 1 a failure while running, 2 bad arguments or input (one line), 130 interrupted.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

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
    from latent_grpo.data import load_rows

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


def command_sft(prog: str, argv: Sequence[str]) -> int:
    """Latent-SFT warm start."""
    from latent_grpo.config import LatentSFTConfig
    from latent_grpo.distributed import process_group, rank
    from latent_grpo.model import load_model, load_tokenizer
    from latent_grpo.sft import LatentSFTTrainer

    about = f"Latent-SFT: the warm start that creates the latent manifold. {SEVERAL_PROCESSES}"
    args = parse_config(prog, LatentSFTConfig, about, argv)
    require_given(prog, model_name_or_path=args.model_name_or_path, dataset=args.dataset)
    rows = load_dataset_rows(args, args.dataset, args.dataset_split, args.limit)
    tokenizer = load_tokenizer(args.model_name_or_path)
    with process_group():
        model = load_model(args.model_name_or_path, args.dtype, args.device)
        values = LatentSFTTrainer(model, args, rows, tokenizer).train()
        if rank() == 0:
            print(f"saved {args.output_dir} (loss {values['loss']:.4f})")
    return 0


def command_train(prog: str, argv: Sequence[str]) -> int:
    """Latent-GRPO, or text GRPO with --latent False."""
    from latent_grpo.config import LatentGRPOConfig
    from latent_grpo.distributed import process_group, rank
    from latent_grpo.trainer import LatentGRPOTrainer

    about = f"Latent-GRPO (arXiv 2604.27998); text GRPO with --latent False. {SEVERAL_PROCESSES}"
    args = parse_config(prog, LatentGRPOConfig, about, argv)
    require_given(prog, model_name_or_path=args.model_name_or_path, dataset=args.dataset)
    rows = load_dataset_rows(args, args.dataset, args.dataset_split, args.limit)
    evaluation = load_dataset_rows(args, args.eval_dataset, "test", args.eval_limit) if args.eval_dataset else None
    with process_group():
        trainer = LatentGRPOTrainer(args.model_name_or_path, None, args, rows, evaluation)
        values = trainer.train()
        if rank() == 0:
            print(f"saved {args.output_dir} (reward {values.get('reward', float('nan')):.3f})")
    return 0


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


def eval_parser(prog: str) -> Parser:
    """Flags of `eval`."""
    about = (
        "Evaluate a model: Pass@1 noise-free, pass@k under noise, reasoning tokens, with 95% bootstrap intervals. "
        "Under torchrun the problems are split across the ranks; the results are those of one process."
    )
    parser = Parser(prog=prog, description=about, allow_abbrev=False)
    sampling_flags(parser)
    parser.add_argument("--noise", choices=("one_sided", "two_sided"), default="one_sided", help="noise of pass@k")
    parser.add_argument(
        "--data", nargs="+", required=True,
        help="benchmarks by name (gsm8k-aug, gsm-hard, svamp, multiarith, math-500, aime24, aime25, gpqa-diamond), "
        "low-difficulty or high-difficulty (the first or last four of them), JSON, JSONL or Parquet files, Hub names; "
        "gsm8k=FILE takes a file for a benchmark, any LABEL=SOURCE names a row of the table",
    )  # fmt: skip
    parser.add_argument("--split", default="test", help="split of Hub datasets that are no benchmarks")
    parser.add_argument("--pass-at", "--pass_at", default="1", help="comma-separated k, as 1,8,32")
    parser.add_argument(
        "--num_samples", type=int, default=None,
        help="sampled responses a problem for pass@k; default: the largest k, and none where that is 1",
    )  # fmt: skip
    parser.add_argument("--limit", type=int, default=None, help="only the first rows of each data set")
    parser.add_argument("--batch_size", type=int, default=64, help="responses decoded together")
    parser.add_argument("--out", default=None, help="write OUT.json (with every response) and OUT.md")
    for column in ("prompt_column", "answer_column", "chain_column"):
        parser.add_argument(f"--{column}", default=None, help="for data in no known format")
    return parser


def command_eval(prog: str, argv: Sequence[str]) -> int:
    """Pass@1, pass@k and reasoning tokens on benchmarks by name, files or Hub data."""
    args = eval_parser(prog).parse_args(argv)
    from latent_grpo.distributed import process_group

    tries = passes(args)
    with process_group():
        return run_evaluation(args, tries)


def passes(args: argparse.Namespace) -> list[int]:
    """The k of --pass-at; ConfigError for what cannot be evaluated."""
    from latent_grpo.config import ConfigError, require

    require(args.batch_size >= 1, "batch_size", args.batch_size, "give 1 or more")
    try:
        tries = [int(k) for k in args.pass_at.split(",")]
    except ValueError as error:
        raise ConfigError(f"pass-at is {args.pass_at!r}: give whole numbers, as 1,8,32") from error
    require(min(tries) >= 1, "pass-at", args.pass_at, "give 1 or more")
    enough = args.num_samples is None or args.num_samples >= max(tries)
    require(enough, "num_samples", args.num_samples, f"pass@{max(tries)} needs at least {max(tries)}")
    return tries


def run_evaluation(args: argparse.Namespace, tries: list[int]) -> int:
    """Evaluate and report, from rank 0 alone."""
    from dataclasses import asdict

    from latent_grpo.benchmarks import load_benchmarks
    from latent_grpo.distributed import rank
    from latent_grpo.evaluation import evaluate
    from latent_grpo.report import (
        environment,
        evaluation_cells,
        evaluation_document,
        mean_over_data,
        require_writable,
        write_json,
        write_text,
    )

    out = None if args.out is None else Path(args.out)
    if out is not None:
        out = out.with_suffix("") if out.suffix in (".json", ".md") else out
        require_writable(out)
    columns = {f"{name}_column": getattr(args, f"{name}_column") for name in ("prompt", "answer", "chain")}
    data = load_benchmarks(args.data, split=args.split, limit=args.limit, **columns)
    model, tokenizer, sampling = load_for_sampling(args)
    sampling.noise = args.noise
    results = {
        label: evaluate(
            model, tokenizer, rows, sampling, pass_at=tries, num_samples=args.num_samples, batch_size=args.batch_size,
            end_marker=args.end_marker, label=label, show_progress=True,
        )
        for label, rows in data.items()
    }  # fmt: skip
    if rank() > 0:
        return 0
    caption = "Pass@1 noise-free, pass@k under noise, tokens before the answer; below: 95% intervals over problems"
    Console().print(evaluation_cells(results, short=True).rich("Evaluation", caption))
    if out is not None:
        record = {
            "model": args.model, "data": args.data, "pass_at": tries, "sampling": asdict(sampling),
            "environment": environment(model.device), "mean": mean_over_data(results), "results": results,
        }  # fmt: skip
        write_json(Path(f"{out}.json"), record)
        write_text(Path(f"{out}.md"), evaluation_document(record))
        print(f"wrote {out}.json and {out}.md")
    return 0


def generate_parser(prog: str) -> Parser:
    """Flags of `generate`."""
    parser = Parser(
        prog=prog, description="Answer a prompt, each latent step shown as its mixture.", allow_abbrev=False
    )
    sampling_flags(parser)
    parser.add_argument("--prompt", required=True, help="the question")
    parser.add_argument("--sample", action="store_true", help="with noise; default is noise-free and greedy")
    parser.add_argument("--top", type=int, default=4, help="components shown of every mixture")
    return parser


def command_generate(prog: str, argv: Sequence[str]) -> int:
    """Answer one prompt and show every latent step as its mixture."""
    args = generate_parser(prog).parse_args(argv)
    from dataclasses import replace

    from latent_grpo.generation import generate_latent
    from latent_grpo.model import encode_prompts
    from latent_grpo.show import print_response

    model, tokenizer, sampling = load_for_sampling(args)
    if not args.sample:
        sampling = replace(sampling, noise="none", temperature=0.0)
    rollout = generate_latent(model, *encode_prompts(tokenizer, [args.prompt], model.device), sampling)
    print_response(tokenizer, rollout, 0, args.end_marker, top=args.top)
    return 0


def quickstart_parser(prog: str) -> Parser:
    """Flags of `quickstart`."""
    about = "Latent-SFT, Latent-GRPO and evaluation of a tiny model on made-up word problems: minutes on a CPU."
    parser = Parser(prog=prog, description=about, allow_abbrev=False)
    parser.add_argument("--out", default="runs/quickstart", help="folder for checkpoints, metrics and curves")
    parser.add_argument("--seed", type=int, default=0, help="seed of problems, model, sampling and noise")
    parser.add_argument(
        "--loss_on", choices=("all", "latent", "text"), default="all", help="steps carrying the policy loss"
    )
    return parser


def command_quickstart(prog: str, argv: Sequence[str]) -> int:
    """The whole job on an embedded default."""
    args = quickstart_parser(prog).parse_args(argv)
    from latent_grpo.quickstart import quickstart

    quickstart(Path(args.out), seed=args.seed, loss_on=args.loss_on)
    return 0


def command_compare(prog: str, argv: Sequence[str]) -> int:
    """Methods and ablations over several seeds: one table, one figure."""
    from latent_grpo.config import CompareConfig, LatentGRPOConfig, LatentSFTConfig

    about = (
        "Latent-SFT, Latent-GRPO, SofT-GRPO, text SFT, text GRPO and the paper's ablations over several seeds, by "
        "default on the quickstart's world. Given again, it does only the runs that have no result yet."
    )
    args = parse_config(prog, CompareConfig, about, argv)
    given = {"sft_config": LatentSFTConfig, "grpo_config": LatentGRPOConfig}
    sft, grpo = (
        parse_config(prog, config, "", ["--config", path]) if (path := getattr(args, name)) else None
        for name, config in given.items()
    )
    from latent_grpo.compare import claim_folder, make_plan, run_all
    from latent_grpo.compare_report import cells, write_report

    plan = make_plan(args, sft, grpo)
    claim_folder(plan)
    failures = run_all(plan)
    summary = write_report(plan, failures)
    console = Console(highlight=False)
    if summary:
        caption = "mean ± standard deviation over seeds; difference: of Pass@1 to Latent-GRPO, seed by seed"
        console.print(cells(summary, ablations=False, short=True).rich("Methods", caption))
        console.print(cells(summary, ablations=True, short=True).rich("Ablations of Latent-GRPO", caption))
        print(f"comparison.md, comparison.json and comparison.png are in {args.output_dir}/")
    for run, reason in failures.items():
        print(f"failed: {run}: {reason}", file=sys.stderr)
    return FAILURE if failures else 0


def doctor_parser(prog: str, plan: bool = False) -> Parser:
    """Flags of `doctor`; with `plan` without those that are then of train."""
    about = (
        "Check the environment and, with --model, a model. With --plan: what training it takes of memory; further "
        "flags are then those of train (--config F, --generation_batch_size N, ...), and no weights are read."
    )
    parser = Parser(prog=prog, description=about, allow_abbrev=False)
    parser.add_argument("--model", default=None, help="model folder or Hub name to check")
    parser.add_argument("--plan", action="store_true", help="predict the memory of training instead of checking")
    if not plan:
        parser.add_argument("--end_marker", default="</think>", help="text whose first token ends a latent run")
        parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="precision")
    return parser


def command_doctor(prog: str, argv: Sequence[str]) -> int:
    """Environment, Triton and GPU, end marker, train/rollout parity, memory estimate."""
    plan = "--plan" in argv
    parser = doctor_parser(prog, plan)
    if plan:
        args, rest = parser.parse_known_args(argv)
        from latent_grpo.config import LatentGRPOConfig
        from latent_grpo.doctor import show_plan

        config = parse_config(prog, LatentGRPOConfig, parser.description or "", rest)
        path = args.model or config.model_name_or_path
        require_given(prog, model=path)
        return show_plan(path, config)
    args = parser.parse_args(argv)
    from latent_grpo.doctor import doctor

    return doctor(args.model, args.end_marker, args.dtype)


def inspect_parser(prog: str) -> Parser:
    """Flags of `inspect`."""
    parser = Parser(prog=prog, description="Show a run: curves, alarms, responses.", allow_abbrev=False)
    parser.add_argument("run", help="output folder of sft or train")
    parser.add_argument("--samples", type=int, default=3, help="responses shown (needs --log_completions in training)")
    parser.add_argument("--step", type=int, default=None, help="step of the responses; default: the last one logged")
    parser.add_argument("--top", type=int, default=4, help="components shown of every mixture, up to 4")
    parser.add_argument("--all", action="store_true", help="every metric, not the main ones alone")
    parser.add_argument("--png", default=None, help="also draw the curves into this file")
    return parser


def command_inspect(prog: str, argv: Sequence[str]) -> int:
    """Curves, alarms and responses of a run."""
    args = inspect_parser(prog).parse_args(argv)
    from latent_grpo.config import require
    from latent_grpo.inspection import inspect_run

    require(args.samples >= 0, "samples", args.samples, "give 0 (none) or more")
    require(args.top >= 1, "top", args.top, "give 1 or more")
    picture = Path(args.png) if args.png else None
    inspect_run(
        Path(args.run), samples=args.samples, step=args.step, top=args.top, every_metric=args.all, picture=picture
    )
    return 0


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
        from latent_grpo.reward import RewardError

        if not isinstance(error, RewardError):
            raise
        print(f"latent-grpo {command}: {error}", file=sys.stderr)
        return FAILURE


def is_input_error(error: Exception) -> bool:
    """Whether an error is about what the user gave, and so worth one line instead of a traceback."""
    from latent_grpo.config import ConfigError
    from latent_grpo.data import DataError
    from latent_grpo.model import ModelError

    return isinstance(error, ConfigError | DataError | ModelError)
