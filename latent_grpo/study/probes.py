"""`latent-grpo probes`: a small experiment for each mechanism of the method, what theory predicts and what comes out.

Every probe starts from a warm start of a world of the quickstart. A finding has a prediction, a table, and whether the
table bears the prediction out.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.console import Console

from latent_grpo.config import LatentGRPOConfig, LatentSampling
from latent_grpo.errors import ConfigError
from latent_grpo.model import load_model
from latent_grpo.prompts import encode_prompts
from latent_grpo.quickstart.graph_world import GraphWorld, make_problems
from latent_grpo.quickstart.run import HELD_OUT_PROBLEMS, TRAIN_PROBLEMS, base_model, grpo_config, sft_config
from latent_grpo.quickstart.worlds import WORLDS
from latent_grpo.rollout.generate import generate_latent
from latent_grpo.sft import LatentSFTTrainer, build_examples
from latent_grpo.study.gradient_probes import GROUP, MARGIN_GRADIENTS, LastStep, direction, sign_shares
from latent_grpo.study.policy_probes import answer_mass, invalid_samples, off_manifold, selection
from latent_grpo.study.probes_report import Finding, write_report
from latent_grpo.trainer import LatentGRPOTrainer
from latent_grpo.watching.tables import Cells

UPDATES = (0, 1, 4, 16)  # after which the signs of the components are looked at
ROLLOUTS = 60  # of a training run
PROBLEMS = 300  # held-out problems that are looked at
DIRECTIONS, SAMPLES = 40, 512  # problems whose gradient is measured, and samples of each
SCALES = (0.0, 0.25, 0.5, 1.0, 2.0)
SETTINGS: dict[str, dict[str, Any]] = {
    "K 2": {"latent_top_k": 2},
    "K 4": {"latent_top_k": 4},
    "K 2, tau 0.5": {"latent_top_k": 2, "tau": 0.5},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "masked": {},
    "kept": {"invalid": "keep"},
    "masked, loss on latent": {"loss_on": "latent"},
    "kept, loss on latent": {"loss_on": "latent", "invalid": "keep"},
}


@dataclass
class Bench:
    """What all probes share: a world's problems, the folder of its warm start, and the options of a run."""

    folder: Path
    world: str
    seed: int
    train: list[Any]
    held_out: list[Any]
    args: LatentGRPOConfig

    @property
    def start(self) -> str:
        """The folder of the warm start."""
        return str(self.folder / "latent-sft")

    def trainer(self, name: str, **changes: Any) -> LatentGRPOTrainer:
        """Return a trainer from the warm start with some options changed, before its first step."""
        args = replace(self.args, output_dir=str(self.folder / "runs" / name), **changes)
        return LatentGRPOTrainer(self.start, None, args, self.train, self.held_out[:PROBLEMS])


def make_bench(folder: Path, world: str, seed: int) -> Bench:
    """Train the warm start of a world into `folder`. Raises ConfigError if the folder holds something."""
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"--out {str(folder)!r} is not empty; choose another folder")
    task = WORLDS[world]
    problems = task.problems(TRAIN_PROBLEMS + HELD_OUT_PROBLEMS, seed)
    train, held_out = problems[HELD_OUT_PROBLEMS:], problems[:HELD_OUT_PROBLEMS]
    tokenizer = task.tokenizer()
    options = sft_config(folder, seed, world)
    model = base_model(world, options, tokenizer, train)
    LatentSFTTrainer(model, options, task.examples(train, seed), tokenizer).train()
    # The paper's noise, and no bound of the latent run, so that its length can be seen.
    changes: dict[str, Any] = {"noise_scale": 1.0, "max_latent_steps": None, "max_rollouts": ROLLOUTS, "eval_steps": 0}
    args = replace(grpo_config(folder, seed, "all", world), lr_scheduler_type="constant", log_table=False, **changes)
    return Bench(folder, world, seed, train, held_out, args)


def signs(bench: Bench) -> Finding:
    """Probe 1: whether the update of a component has the advantage's sign."""
    numbers: list[dict[str, Any]] = []
    responses = bench.args.generation_batch_size
    for kind in ("one_sided", "two_sided"):
        trainer = bench.trainer(f"signs-{kind}", noise=kind, per_device_train_batch_size=responses)
        numbers += [{"noise": kind, **shares} for shares in sign_shares(trainer, UPDATES)]
    rows = [[f"{n['noise']}, {n['updates']} updates", *(f"{n[m]:.3f}" for m in MARGIN_GRADIENTS)] for n in numbers]
    on_policy = {n["noise"]: n["none"] for n in numbers if n["updates"] == 0}
    return Finding(
        "signs",
        "Components whose update has the advantage's sign",
        "With one-sided noise all of them on policy; with two-sided noise only those whose noise was above 0 (Eq. 15).",
        Cells(["noise", *MARGIN_GRADIENTS], rows),
        on_policy["one_sided"] > 0.995 > 0.95 > on_policy["two_sided"],
        numbers,
        (
            "With two-sided noise, some components of an update go against the advantage; one-sided noise ends that.",
            "Look at what the noise is here before you trust the sign of an update.",
        ),
    )


def directions(bench: Bench) -> Finding:
    """Probe 1: whether the surrogate gradient points where the expected reward rises."""
    trainer = bench.trainer("directions")
    quiet = LatentSampling(**{**vars(trainer.sampling), "noise": "none", "temperature": 0.0})
    problems = bench.held_out[:DIRECTIONS]
    ids, mask = encode_prompts(
        trainer.tokenizer, [row["prompt"] for row in problems], trainer.device, prompt_format=trainer.prompt_format
    )
    rollout = generate_latent(trainer.model, ids, mask, quiet)
    generator = torch.Generator().manual_seed(bench.seed)
    trainer.model.eval()
    found = []
    for row in rollout.latent_steps.nonzero().squeeze(-1).tolist():
        answer = trainer.tokenizer.convert_tokens_to_ids(problems[row]["answer"])
        end = int(trainer.sampling.end_token_id or 0)
        step = LastStep(trainer.model, rollout, row, end, answer, trainer.args.temperature)
        cosines = direction(step, SAMPLES, trainer.args.latent_top_k, trainer.args.latent_top_p, generator)
        if all(value == value for value in cosines.values()):  # no NaN: the reward depends on the step
            found.append(cosines)
    spreads = {name: [one[name] for one in found] for name in found[0]}
    names = ("one_sided", "two_sided", "likelihood")
    rows = []
    for name in names:
        size = mean(spreads[f"size {name}"]) / mean(spreads["size two_sided"])
        columns = [_interval(spreads[name + of]) for of in ("", f" of {GROUP}")]
        rows.append([name, *columns, f"{size:.2f}"])
    headings = ["surrogate", f"cosine, {SAMPLES} samples", f"cosine, a group of {GROUP}", "size"]
    return Finding(
        "directions",
        "Cosine of the surrogate's gradient to the true gradient of the expected reward, at the last latent step",
        "The surrogate points along it, with either noise. Where the kept ids do not vary, one-sided noise makes it "
        "e^-1.5 = 0.22 times as large.",
        Cells(headings, rows),
        min(mean(spreads["one_sided"]), mean(spreads["two_sided"])) > 0.9,
        [{"problems": len(found), **{name: mean(values) for name, values in spreads.items()}}],
        (
            "On average either noise learns the right thing; what differs is how much a latent step weighs.",
            "The surrogate does not follow the reward here: no rule of noise or selection can make up for that.",
        ),
    )


def _interval(values: list[float]) -> str:
    half = 1.96 * stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return f"{mean(values):.3f} ± {half:.3f}"


def noise(bench: Bench) -> Finding:
    """Probe 2: what noise on latent steps does to the answer and to the next step."""
    numbers = list(off_manifold(bench.trainer("noise"), bench.held_out[:PROBLEMS], SCALES, SETTINGS))
    at = {(n["setting"], n["scale"]): n for n in numbers}
    rows = [
        [
            f"{scale:g}",
            *(f"{at[name, scale]['accuracy']:.3f}, {at[name, scale]['divergence']:.3f}" for name in SETTINGS),
        ]
        for scale in SCALES
    ]
    return Finding(
        "noise",
        "Accuracy after noisy latent steps, and divergence of the next step's distribution in nats, by noise scale",
        "Noise leaves the mixtures that the warm start has seen: accuracy falls and divergence grows with the scale.",
        Cells(["scale", *SETTINGS], rows),
        all(
            at[name, SCALES[-1]]["accuracy"] < at[name, 0.0]["accuracy"]
            and at[name, SCALES[-1]]["divergence"] > at[name, SCALES[1]]["divergence"]
            for name in SETTINGS
        ),
        numbers,
        (
            "Keep the noise below the spread of the log-probs within a mixture; wide mixtures lose most by it.",
            "The warm start reads noisy mixtures as well as clean ones: more noise explores more here.",
        ),
    )


def first_tokens(bench: Bench) -> Finding:
    """Probe 3: what the rules of first-token selection do to the first step."""
    args = replace(bench.args, output_dir=str(bench.folder / "runs" / "selection"))
    names = ("best_of_group", "zero_sum", "all", "best_of_correct")
    numbers = list(selection(bench.start, args, bench.train, bench.held_out[:PROBLEMS], names))
    rows = [
        [n["rule"], f"{n['sum']:+.2f}", *(f"{value:.3f}" for value in n["entropies"]), f"{n['pass_at_1']:.3f}"]
        for n in numbers
    ]
    sums, after = ({n["rule"]: n[key] for n in numbers} for key in ("sum", "entropies"))
    return Finding(
        "first tokens",
        f"First-token selection, {ROLLOUTS} rollouts",
        "best_of_correct leaves a negative sum at the first step and its entropy falls; best_of_group a positive one.",
        Cells(["rule", "sum of a group", "entropy before", "entropy after", "Pass@1 after"], rows),
        sums["best_of_correct"] < -0.1 < 0.1 < sums["best_of_group"]
        and after["best_of_correct"][1] < after["best_of_group"][1],
        numbers,
        (
            "best_of_group is the default: the rule as the paper words it makes the first step nearly deterministic.",
            "The sign of the sum does not decide what becomes of the first step here.",
        ),
    )


def routes(bench: Bench) -> Finding:
    """Probe 3: whether the average of two right routes reads worse than either (graph world alone)."""
    problems = make_problems(PROBLEMS, seed=bench.seed, world=GraphWorld(routes=2))
    single = [{**row, "latent_steps": row["chain"].split()} for row in bench.train]
    tokenizer = WORLDS[bench.world].tokenizer()
    options = replace(sft_config(bench.folder, bench.seed, bench.world), output_dir=str(bench.folder / "routes-sft"))
    model = load_model(f"{bench.start}-base", "float32", "cpu")
    other = LatentSFTTrainer(model, options, single, tokenizer)
    other.train()
    answers = torch.tensor(tokenizer.convert_tokens_to_ids([row["answer"] for row in problems]))
    numbers: list[dict[str, Any]] = []
    models = {"frontiers": bench.trainer("routes").model, "single routes": other.model}
    for name, model in models.items():
        masses = {}
        for place, label in ((0, "route A"), (1, "route B"), (None, "average")):
            rows = [{**row, "latent_steps": [_parents(row, place), row["answer"]]} for row in problems]
            masses[label] = answer_mass(model, build_examples(tokenizer, rows, options), answers)
        numbers.append({"warm start": name, **masses})
    labels, alone = ("route A", "route B", "average"), numbers[1]
    table = [[n["warm start"], *(f"{n[label]:.3f}" for label in labels)] for n in numbers]
    return Finding(
        "routes",
        "Weight of the answer at the last step, after the first step of either of two right routes and their average",
        "The average holds a mixture that single routes never show, so there it reads worse than both.",
        Cells(["warm start", *labels], table),
        alone["average"] < min(alone["route A"], alone["route B"]),
        numbers,
        (
            "Selecting one route at the first step has something to mend for such a warm start.",
            "Averages of routes do little harm here, so selection has little to mend.",
        ),
    )


def _parents(row: Any, place: int | None) -> str:
    """Return the first node of one of a problem's two routes, or both nodes."""
    edges = [edge.split(">") for edge in row["prompt"].split(" to ")[0].split()]
    reached = row["latent_steps"][0].split()
    parents = sorted(node for node, after in edges if after == row["answer"] and node in reached)
    return " ".join(parents if place is None else [parents[place]])


def masking(bench: Bench) -> Finding:
    """Probe 4: length and cut-off share with and without masking, and with the loss on latent steps alone."""
    args = replace(bench.args, output_dir=str(bench.folder / "runs" / "masking"), max_rollouts=2 * ROLLOUTS)
    numbers = list(invalid_samples(bench.start, args, bench.train, bench.held_out[:PROBLEMS], VARIANTS))
    keys = ("latent_steps", "cut_off", "pass_at_1")
    rows = [[n["variant"], *(f"{n[key]:.3f}" for key in keys)] for n in numbers]
    at = {n["variant"]: n for n in numbers}
    return Finding(
        "masking",
        f"Cut-off responses masked or kept, {2 * ROLLOUTS} rollouts, means of the last ten",
        "Kept, cut-off responses make runs longer. With the loss on latent steps alone nothing trains a run's end.",
        Cells(["variant", "latent steps", "cut off", "Pass@1 after"], rows),
        at["kept"]["cut_off"] > at["masked"]["cut_off"] + 0.02,
        numbers,
        (
            "Mask cut-off responses. If text steps have no loss, bound the latent run with max_latent_steps.",
            "Masking makes no difference where hardly any response is cut off.",
        ),
    )


def run_probes(bench: Bench) -> Iterator[Finding]:
    """Yield the findings one by one."""
    yield signs(bench)
    yield directions(bench)
    yield noise(bench)
    yield first_tokens(bench)
    if bench.world == "graph":
        yield routes(bench)
    yield masking(bench)


def probes(out: Path, *, world: str = "graph", seed: int = 0) -> list[Finding]:
    """Run every probe of a world, write probes.md, .json and .svg into `out`, and return the findings.

    Raises ConfigError if `out` holds something.
    """
    started = time.perf_counter()
    bench = make_bench(out, world, seed)
    console = Console(highlight=False)
    findings = []
    for finding in run_probes(bench):
        findings.append(finding)
        console.print(finding.cells.rich(finding.title, finding.outcome))
    seconds = round(time.perf_counter() - started)
    write_report(out, findings, f"latent-grpo probes --world {world} --seed {seed}", seconds)
    console.print(f"{seconds} s; probes.md, probes.json and probes.svg are in {out}/")
    return findings
