"""`latent-grpo compare`: the methods and the ablations of the paper on one task, over several seeds.

An arm is a method or an ablation. A run is one arm of one seed. Each seed has a latent and a text warm start, and every
arm of the seed starts from one of them. So arms differ in one thing only, and differences can be taken seed by seed.

Runs go to worker processes, each on its own CPU threads. A run keeps its result in `seed-N/ARM/result.json`. When the
command is given again, it skips the runs that have a result.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from latent_grpo.config import LatentGRPOConfig, LatentSampling, LatentSFTConfig
from latent_grpo.data.rows import load_rows, load_training_rows
from latent_grpo.errors import ConfigError, first_line
from latent_grpo.evaluation import evaluate
from latent_grpo.model import end_marker_ids, eos_ids, load_model, load_tokenizer, with_chosen_dtype
from latent_grpo.prompts import PromptFormat, resolve_format
from latent_grpo.quickstart.run import base_model, grpo_config, sft_config, with_searches
from latent_grpo.quickstart.worlds import WORLDS
from latent_grpo.recipes.read import read_yaml
from latent_grpo.saving.atomic_files import require_writable, write_json
from latent_grpo.sft import LatentSFTTrainer
from latent_grpo.study.config import CompareConfig
from latent_grpo.trainer import LatentGRPOTrainer
from latent_grpo.watching.environment import environment
from latent_grpo.watching.metrics import progress_bar


@dataclass(frozen=True)
class Arm:
    """One line of the comparison: a warm start, or a reinforced model with some options of the full method changed."""

    label: str
    start: str  # name of the warm start that the arm is, or starts from
    changes: dict[str, Any] = field(default_factory=dict)  # changed options of LatentGRPOConfig
    recipe: str = ""  # name of a recipe with further changed options

    @property
    def ablation(self) -> bool:
        """Whether the arm is the full method with one option changed."""
        return bool(self.changes)

    def options(self) -> dict[str, Any]:
        """Return the options of LatentGRPOConfig in which the arm differs from the full method."""
        return {**(read_yaml(self.recipe, LatentGRPOConfig) if self.recipe else {}), **self.changes}


LATENT, TEXT, SEARCH, FULL = "latent-sft", "text-sft", "text-search-sft", "latent-grpo"
ARMS = {
    LATENT: Arm("warm start (uniform targets)", LATENT),
    FULL: Arm("Latent-GRPO", LATENT),
    "two-sided-plain": Arm("two-sided noise, plain GRPO", LATENT, recipe="two-sided-noise"),
    TEXT: Arm("text SFT", TEXT),
    # Neither has a latent warm start: they begin with a model that reasons in text.
    "soft-grpo": Arm("SofT-GRPO", TEXT, recipe="soft-grpo"),
    "multiplex": Arm("Multiplex Thinking", TEXT, recipe="multiplex"),
    "text-grpo": Arm("text GRPO", TEXT, recipe="text-grpo"),
    # Only where a problem has a chain that searches, beside the one that goes straight to the answer.
    SEARCH: Arm("text SFT on searches", SEARCH),
    "text-search-grpo": Arm("text GRPO from searches", SEARCH, recipe="text-grpo"),
    "two-sided-noise": Arm("two-sided noise", LATENT, {"noise": "two_sided"}),
    "first-token-as-written": Arm("first-token selection as written", LATENT, {"first_token": "best_of_correct"}),
    "no-first-token-selection": Arm("no first-token selection", LATENT, {"first_token": "all"}),
    "no-invalid-masking": Arm("no invalid masking", LATENT, {"invalid": "keep"}),
    "margin-released": Arm("margin gradient as released", LATENT, {"margin_gradient": "released"}),
    "margin-none": Arm("no margin gradient", LATENT, {"margin_gradient": "none"}),
    "loss-on-latent": Arm("loss on latent steps only", LATENT, {"loss_on": "latent"}),
    "loss-on-text": Arm("loss on text steps only", LATENT, {"loss_on": "text"}),
}
RESULT, PLAN, LOG = "result.json", "plan.json", "log.txt"


@dataclass(frozen=True)
class Run:
    """One arm of one seed."""

    seed: int
    arm: str

    @property
    def start(self) -> Run:
        """The warm start that this run starts from. A warm start is its own."""
        return Run(self.seed, ARMS[self.arm].start)

    def folder(self, args: CompareConfig) -> Path:
        """Return the folder of the run's model, metrics, log and result."""
        return Path(args.output_dir) / f"seed-{self.seed}" / self.arm

    def __str__(self) -> str:
        return f"seed {self.seed}, {self.arm}"


@dataclass(frozen=True)
class Plan:
    """Everything that the result of a run depends on. Worker processes get a copy."""

    args: CompareConfig
    sft: LatentSFTConfig
    grpo: LatentGRPOConfig

    @property
    def embedded(self) -> bool:
        """Whether the task is a world of the quickstart, made on the spot."""
        return not self.sft.model_name_or_path

    def sft_options(self, run: Run) -> LatentSFTConfig:
        """Return the options of a warm start."""
        folder = str(run.folder(self.args))
        return replace(self.sft, output_dir=folder, seed=run.seed, latent=run.arm == LATENT)

    def grpo_options(self, run: Run) -> LatentGRPOConfig:
        """Return the options of a reinforced run. For a warm start, they say how its responses are sampled."""
        changes: dict[str, Any] = {"latent": run.start.arm == LATENT, **ARMS[run.arm].options()}
        return replace(self.grpo, output_dir=str(run.folder(self.args)), seed=run.seed, **changes)

    def identity(self) -> dict[str, Any]:
        """Return the options that must stay the same for finished runs to be kept."""
        args = asdict(self.args)
        names = ("world", "train_problems", "held_out_problems", "num_samples", "threads")
        shared = {name: args[name] for name in names}
        return {**shared, "sft": asdict(self.sft), "grpo": asdict(self.grpo)}


def make_plan(args: CompareConfig, sft: LatentSFTConfig | None = None, grpo: LatentGRPOConfig | None = None) -> Plan:
    """Return the plan of a comparison. Without `sft` and `grpo`, it is of a world of the quickstart and its options.

    Raises ConfigError if only one of `sft` and `grpo` is given, or if they name no data.
    """
    if (sft is None) != (grpo is None):
        raise ConfigError(
            "sft_config and grpo_config belong together; give both, or none for a world of the quickstart"
        )
    sft = sft or sft_config(Path(), 0, args.world)
    # The full method selects first tokens, which the quickstart's arithmetic leaves out.
    grpo = grpo or replace(grpo_config(Path(), 0, "all", args.world), first_token="best_of_group")
    # Folder and seed are a run's own. Zeros keep them out of what `claim_folder` compares.
    sft = replace(with_chosen_dtype(sft), output_dir="", seed=0, max_steps=args.sft_steps or sft.max_steps)
    grpo = replace(with_chosen_dtype(grpo), output_dir="", seed=0, save_steps=0)
    if args.grpo_steps:
        grpo = replace(grpo, max_steps=-1, max_rollouts=args.grpo_steps)
    plan = Plan(args, sft, grpo)
    if not plan.embedded and not (sft.dataset and grpo.dataset and grpo.eval_dataset):
        raise ConfigError("a comparison needs data: set dataset in sft_config, dataset and eval_dataset in grpo_config")
    return plan


def all_runs(args: CompareConfig) -> list[Run]:
    """Return every run, warm starts first. Raise ConfigError for an arm that does not exist."""
    searches = args.world == "graph" and not args.sft_config
    possible = [name for name, arm in ARMS.items() if searches or arm.start != SEARCH]
    chosen = args.arms or possible
    for name in chosen:
        if name not in possible:
            raise ConfigError(f"arms holds {name!r}: choose from {', '.join(possible)}")
    starts = [name for name in (LATENT, TEXT, SEARCH) if any(ARMS[arm].start == name for arm in chosen)]
    rest = [name for name in ARMS if name in chosen and name not in starts]
    return [Run(seed, arm) for names in (starts, rest) for seed in args.seeds for arm in names]


def claim_folder(plan: Plan) -> None:
    """Make the output folder, or check that it holds a comparison with the same options. Raise ConfigError if not."""
    folder = Path(plan.args.output_dir)
    identity = json.loads(json.dumps(plan.identity()))  # through JSON, as the saved one: tuples become lists
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not (folder / PLAN).is_file():
        raise ConfigError(f"output_dir {str(folder)!r} holds something else than a comparison; choose another folder")
    if not (folder / PLAN).is_file():
        require_writable(folder / PLAN)
        write_json(folder / PLAN, identity)
        return
    try:
        saved = json.loads((folder / PLAN).read_text())
    except ValueError as error:
        raise ConfigError(f"{str(folder / PLAN)!r} is not valid JSON; choose another output_dir") from error
    for name, old, new in differences(saved, identity):
        raise ConfigError(
            f"output_dir {str(folder)!r} holds runs made with {name} {old!r}, now {new!r}; choose another output_dir"
        )


def differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted name, old value, new value) of each nested option whose values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*new, *(key for key in old if key not in new)]:
            yield from differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield name, old, new


def run_all(plan: Plan) -> dict[Run, str]:
    """Do every run that has no result yet. Return the reason, in one line, for each run that failed.

    KeyboardInterrupt stops the workers. It keeps the results of the finished runs; the next command repeats the others.
    """
    args = plan.args
    runs = all_runs(args)
    pending = [run for run in runs if not finished(plan, run)]
    running: dict[Future[float], Run] = {}
    failures: dict[Run, str] = {}
    other_children = multiprocessing.active_children()
    pool, pool_broken = worker_pool(args), False
    with progress_bar("Runs", len(runs), len(runs) - len(pending)) as bar:
        try:
            while pending or running:
                # A worker that dies breaks its whole pool. Give it no more runs, and replace it when none is left.
                if pool_broken and not running:
                    pool.shutdown()
                    pool, pool_broken = worker_pool(args), False
                startable = [run for run in pending if run == run.start or finished(plan, run.start)]
                for run in startable[: 0 if pool_broken else args.workers - len(running)]:
                    pending.remove(run)
                    running[pool.submit(execute, plan, run)] = run
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    run, error = running.pop(future), future.exception()
                    pool_broken |= isinstance(error, BrokenProcessPool)
                    if isinstance(error, KeyboardInterrupt):  # Ctrl-C reaches the workers too
                        raise error
                    if error is not None:
                        failures[run] = _reason(error, run.folder(args) / LOG)
                        failures |= {arm: "its warm start failed" for arm in pending if arm.start == run}
                        pending = [arm for arm in pending if arm not in failures]
                    bar.advance(f"{run}: {'failed' if error else f'Pass@1 {future.result():.3f}'}")
        except KeyboardInterrupt:
            for child in multiprocessing.active_children():
                if child not in other_children:
                    child.terminate()
            raise
        finally:
            pool.shutdown()
    return failures


def _reason(error: BaseException, log: Path) -> str:
    """Return why a run failed, in one line."""
    if isinstance(error, BrokenProcessPool):
        return f"its process died, perhaps for lack of memory (see {log})"
    return f"{type(error).__name__}: {first_line(error)} (see {log})"


def worker_pool(args: CompareConfig) -> ProcessPoolExecutor:
    """Return a pool of fresh processes. A forked process would inherit the state of torch's threads."""
    return ProcessPoolExecutor(args.workers, mp_context=multiprocessing.get_context("spawn"))


def finished(plan: Plan, run: Run) -> bool:
    """Return whether a run has a result."""
    return (run.folder(plan.args) / RESULT).is_file()


def execute(plan: Plan, run: Run) -> float:
    """Do one run in a worker process: train, evaluate, write the result. Return its Pass@1."""
    started = time.perf_counter()
    torch.set_num_threads(plan.args.threads)
    folder = run.folder(plan.args)
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier attempt without a result
    folder.mkdir(parents=True)
    with (folder / LOG).open("w", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        train, held_out = problems(plan, run.seed)
        torch.manual_seed(run.seed)
        model, tokenizer = (warm_start if run == run.start else reinforce)(plan, run, train, held_out)
        options = plan.grpo_options(run)
        prompt_format = resolve_format(options, str(folder))
        trained = time.perf_counter()
        result = evaluate(
            model,
            tokenizer,
            held_out,
            sampling(options, model, tokenizer, prompt_format),
            num_samples=plan.args.num_samples,
            batch_size=options.per_device_train_batch_size,
            prompt_format=prompt_format,
        )
    samples = result.pop("samples")
    # For a warm start, this is where the Pass@1 curves of its arms begin: they evaluate the same problems in training.
    watched = samples[: plan.args.watched_problems]
    record = {
        "arm": run.arm,
        "seed": run.seed,
        "result": result,
        "watched_pass_at_1": sum(sample["correct"] for sample in watched) / len(watched),
        "seconds": {"train": trained - started, "evaluate": time.perf_counter() - trained},
        "environment": environment(model.device),
    }
    write_json(folder / RESULT, record)
    return float(result["pass_at_1"])


def problems(plan: Plan, seed: int) -> tuple[list[Any], list[Any]]:
    """Return rows to train on and held-out rows: of a world, made from the seed, or of the configured data."""
    args, grpo = plan.args, plan.grpo
    if plan.embedded:
        rows = WORLDS[args.world].problems(args.train_problems + args.held_out_problems, seed)
        return rows[args.held_out_problems :], rows[: args.held_out_problems]
    columns = {name: getattr(grpo, name) for name in ("prompt_column", "answer_column", "chain_column")}
    held_out = load_rows(str(grpo.eval_dataset), split="test", limit=grpo.eval_limit, **columns)
    return load_training_rows(grpo, keep_columns=True), held_out


def warm_start(plan: Plan, run: Run, train: list[Any], held_out: list[Any]) -> tuple[Any, Any]:
    """Train a warm start with uniform targets, or text SFT on the same chains. Return model and tokenizer."""
    options = plan.sft_options(run)
    if plan.embedded:
        world = WORLDS[plan.args.world]
        tokenizer = world.tokenizer()
        model: Any = base_model(plan.args.world, options, tokenizer, train)
        rows: list[Any] = with_searches(train) if run.arm == SEARCH else world.examples(train, run.seed)
    else:
        tokenizer = load_tokenizer(options.model_name_or_path)
        model = load_model(options.model_name_or_path, options.dtype, options.device)
        rows = load_training_rows(options)
    LatentSFTTrainer(model, options, rows, tokenizer).train()
    return model, tokenizer


def reinforce(plan: Plan, run: Run, train: list[Any], held_out: list[Any]) -> tuple[Any, Any]:
    """Train the seed's warm start with the arm's GRPO. Return model and tokenizer."""
    start, watched = str(run.start.folder(plan.args)), held_out[: plan.args.watched_problems]
    trainer = LatentGRPOTrainer(start, None, plan.grpo_options(run), train, watched)
    trainer.train()
    return trainer.model, trainer.tokenizer


def sampling(options: LatentGRPOConfig, model: Any, tokenizer: Any, prompt_format: PromptFormat) -> LatentSampling:
    """Return how responses are sampled under noise in the evaluation: as in the run's training."""
    end = end_marker_ids(tokenizer, prompt_format.end_marker)[0] if options.latent else None
    return replace(options.sampling(), end_token_id=end, eos_token_id=eos_ids(model, tokenizer))
