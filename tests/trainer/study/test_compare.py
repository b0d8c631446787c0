"""The comparison: its arms, what is kept and done again, failures that lose nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import pytest
from support import REPOSITORY
from support.options import metrics_of

from latent_grpo.commands.main import main
from latent_grpo.errors import ConfigError
from latent_grpo.quickstart import run as quickstart
from latent_grpo.quickstart.toy_task import make_model, make_problems, make_tokenizer
from latent_grpo.quickstart.worlds import WORLDS
from latent_grpo.recipes.read import read_yaml
from latent_grpo.study import compare
from latent_grpo.study.compare import ARMS, FULL, LATENT, SEARCH, TEXT, Run, all_runs, differences, make_plan
from latent_grpo.study.config import CompareConfig
from latent_grpo.watching import metrics

ABLATIONS = {
    "two-sided-noise": {"noise": "two_sided"},
    "first-token-as-written": {"first_token": "best_of_correct"},
    "no-first-token-selection": {"first_token": "all"},
    "no-invalid-masking": {"invalid": "keep"},
    "margin-released": {"margin_gradient": "released"},
    "margin-none": {"margin_gradient": "none"},
    "loss-on-latent": {"loss_on": "latent"},
    "loss-on-text": {"loss_on": "text"},
}
SMALL_OPTIONS = {
    "sft_steps": 3,
    "grpo_steps": 2,
    "train_problems": 80,
    "held_out_problems": 12,
    "watched_problems": 5,
    "num_samples": 2,
}
SMALL = [word for name, value in SMALL_OPTIONS.items() for word in (f"--{name}", str(value))]


@pytest.fixture
def in_process(monkeypatch):
    """Runs are done in this process on small batches: a worker process takes seconds to import torch."""

    def grpo_config(*args):
        small = {"generation_batch_size": 16, "per_device_train_batch_size": 16}
        return replace(quickstart.grpo_config(*args), **small)

    monkeypatch.setattr(compare, "worker_pool", lambda args: ThreadPoolExecutor(1))
    monkeypatch.setattr(compare, "grpo_config", grpo_config)
    # The run's own bar is in this process too, and a console shows one bar at a time.
    monkeypatch.setattr(compare, "progress_bar", partial(metrics.progress_bar, shown=False))


def test_the_full_method_is_the_papers_and_ablations_change_one_thing(tmp_path):
    plan = make_plan(CompareConfig(output_dir=str(tmp_path)))
    full = asdict(plan.grpo_options(Run(1, FULL)))
    paper = {
        "noise": "one_sided",
        "first_token": "best_of_group",
        "invalid": "exclude",
        "margin_gradient": "aligned",
        "loss_on": "all",
        "seed": 1,
    }
    assert {name: full[name] for name in paper} == paper

    def changes(arm: str) -> dict:
        options = asdict(plan.grpo_options(Run(1, arm)))
        return {name: value for name, value in options.items() if value != full[name] and name != "output_dir"}

    assert {name for name, arm in ARMS.items() if arm.ablation} == set(ABLATIONS)
    for name, expected in ABLATIONS.items():
        assert changes(name) == expected
    plain = {"first_token": "all", "invalid": "keep"}
    assert changes("text-grpo") == {**plain, "latent": False, "loss_type": "grpo", "delta": None}
    assert changes("two-sided-plain") == {**plain, "noise": "two_sided", "margin_gradient": "none"}
    for name, method in (("soft-grpo", "soft_grpo"), ("multiplex", "multiplex")):
        assert ARMS[name].start == TEXT  # no latent warm start
        assert changes(name).items() >= {**plain, "method": method, "end_rule": "noisy"}.items()
        assert plan.grpo_options(Run(1, name)).latent
    assert plan.sft_options(Run(1, LATENT)).latent
    assert not plan.sft_options(Run(1, TEXT)).latent


def test_the_recipe_runs_every_arm_over_five_seeds():
    args = CompareConfig(**read_yaml("compare-world", CompareConfig))
    assert len(all_runs(args)) == 5 * len(ARMS)
    assert make_plan(args).grpo.max_rollouts == WORLDS["graph"].grpo["max_rollouts"]


def test_searches_are_a_warm_start_only_where_problems_have_them():
    arithmetic = {run.arm for run in all_runs(CompareConfig(world="arithmetic"))}
    assert set(ARMS) - arithmetic == {SEARCH, "text-search-grpo"}
    with pytest.raises(ConfigError, match="text-search-grpo"):
        all_runs(CompareConfig(world="arithmetic", arms=["text-search-grpo"]))
    plan = make_plan(CompareConfig())
    assert not plan.sft_options(Run(1, SEARCH)).latent
    assert not plan.grpo_options(Run(1, "text-search-grpo")).latent


def test_warm_starts_come_first_and_only_where_needed():
    runs = all_runs(CompareConfig(seeds=[4, 5], arms=["text-grpo"]))
    names = [str(run) for run in runs]
    assert names == ["seed 4, text-sft", "seed 5, text-sft", "seed 4, text-grpo", "seed 5, text-grpo"]
    assert len(all_runs(CompareConfig())) == 3 * len(ARMS)
    with pytest.raises(ConfigError, match=r"'latent-gpro'.*latent-grpo"):
        all_runs(CompareConfig(arms=["latent-gpro"]))


@pytest.mark.parametrize(
    "options", [{"seeds": []}, {"seeds": [1, 1]}, {"workers": 0}, {"grpo_steps": -1}, {"num_samples": 0}], ids=str
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        CompareConfig(**options)


def results(folder: Path) -> dict[str, dict]:
    return {
        f"{path.parent.parent.name}/{path.parent.name}": json.loads(path.read_text())
        for path in folder.glob("seed-*/*/result.json")
    }


def test_rivals_begin_with_the_text_warm_start_and_reason_in_latent_steps(tmp_path, capsys, in_process):
    out = tmp_path / "runs"
    assert main(["compare", "--output_dir", str(out), *SMALL, "--seeds", "0", "--arms", "soft-grpo", "multiplex"]) == 0
    assert set(results(out)) == {"seed-0/text-sft", "seed-0/soft-grpo", "seed-0/multiplex"}
    for arm in ("soft-grpo", "multiplex"):
        assert metrics_of(out / "seed-0" / arm)[0]["latent/share"] > 0
    assert "Ablations" not in capsys.readouterr().out  # an empty table


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_a_comparison_is_written_kept_and_finished(tmp_path, capsys, request, workers):
    if workers == "1":
        request.getfixturevalue("in_process")
    out = tmp_path / "runs"
    command = ["compare", "--output_dir", str(out), *SMALL, "--seeds", "0", "1", "--workers", workers]
    command += ["--arms", FULL, "text-grpo", "two-sided-noise"]
    assert main(command) == 0
    first = results(out)
    assert set(first) == {
        f"seed-{seed}/{arm}" for seed in (0, 1) for arm in (LATENT, TEXT, FULL, "text-grpo", "two-sided-noise")
    }
    document = json.loads((out / "comparison.json").read_text())
    for name, arm in document["arms"].items():
        values = [first[f"seed-{seed}/{name}"]["result"]["pass_at_1"] for seed in (0, 1)]
        assert arm["pass_at_1"]["mean"] == pytest.approx(mean(values), abs=1e-5)
        assert arm["pass_at_1"]["std"] == pytest.approx(stdev(values), abs=1e-5)
        assert arm["pass@1"]["values"] == [
            pytest.approx(first[f"seed-{s}/{name}"]["result"]["pass@1"], abs=1e-5) for s in (0, 1)
        ]
    assert document["failed"] == {}
    curves = next(run for run in document["runs"] if run["arm"] == FULL)["curves"]
    assert curves["reward"]["steps"] == [1, 2]
    text = (out / "comparison.md").read_text()
    arms = ("warm start (uniform targets)", "Latent-GRPO", "text GRPO", "two-sided noise")
    for word in (*arms, "12 held-out problems", "seeds 0, 1"):
        assert word in text
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "Latent-GRPO" in capsys.readouterr().out

    kept = {path: path.stat().st_mtime_ns for path in out.glob("seed-*/*/result.json")}
    again = out / "seed-1" / "two-sided-noise"
    (again / "result.json").unlink()  # as a run that was killed leaves its folder
    assert main(command) == 0
    second = results(out)
    assert second["seed-1/two-sided-noise"]["result"] == first["seed-1/two-sided-noise"]["result"]
    assert {path for path, when in kept.items() if path.stat().st_mtime_ns != when} == {again / "result.json"}

    assert main([*command, "--grpo_steps", "3"]) == 2
    assert "grpo.max_rollouts 2, now 3" in capsys.readouterr().err
    assert results(out) == second


def test_an_interrupted_run_keeps_what_is_finished(tmp_path, in_process, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "reinforce", interrupted)
    command = ["compare", "--output_dir", str(tmp_path), *SMALL, "--seeds", "0", "--arms", FULL]
    assert main(command) == 130
    assert set(results(tmp_path)) == {f"seed-0/{LATENT}"}


@pytest.mark.slow
def test_an_interrupt_stops_the_worker_processes(tmp_path):
    out = tmp_path / "runs"
    command = [sys.executable, "-m", "latent_grpo", "compare", "--output_dir", str(out), *SMALL]
    command += ["--grpo_steps", "100000", "--seeds", "0", "--arms", FULL]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    heeding = dict(preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a background job ignores it
    process = subprocess.Popen(command, env=env, **pipes, **heeding)
    metrics, deadline = out / "seed-0" / FULL / "metrics.jsonl", time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.rstrip().endswith("interrupted")
    assert set(results(out)) == {f"seed-0/{LATENT}"}
    written = metrics.stat().st_size
    time.sleep(1.0)
    assert metrics.stat().st_size == written  # its worker has ended too


def test_a_folder_of_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("mine")
    assert main(["compare", "--output_dir", str(tmp_path), *SMALL]) == 2
    assert "something else than a comparison" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.fixture(scope="module")
def own_task(tmp_path_factory):
    """A model folder, data and configurations of one's own, and a reward that fails once where a file says how."""
    folder = tmp_path_factory.mktemp("own")
    tokenizer = make_tokenizer()
    make_model(tokenizer, seed=0).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "data.jsonl").write_text("\n".join(json.dumps(row) for row in make_problems(16, seed=0)))
    (folder / "reward.py").write_text(
        "import os, pathlib\n"
        "fault = pathlib.Path(__file__).with_name('fault')\n"
        "def reward(completions, **kwargs):\n"
        "    if fault.exists():\n"
        "        kind = fault.read_text()\n"
        "        fault.unlink()\n"
        "        if kind == 'exit':\n"
        "            os._exit(1)\n"
        "        raise RuntimeError('a fault in the reward')\n"
        "    return [float(len(text) % 2) for text in completions]\n"
    )
    (folder / "sft.yaml").write_text(
        f"model_name_or_path: {folder / 'model'}\ndataset: {folder / 'data.jsonl'}\nmax_steps: 2\nlearning_rate: 1e-3\n"
    )
    (folder / "grpo.yaml").write_text(
        f"dataset: {folder / 'data.jsonl'}\neval_dataset: {folder / 'data.jsonl'}\neval_limit: 6\nmax_steps: 2\n"
        f"reward_funcs: ['{folder / 'reward.py'}:reward']\nlatent_top_k: 2\ngeneration_batch_size: 8\n"
        "num_generations: 4\nmax_completion_length: 6\nmax_generation_batches: 1\nlearning_rate: 1e-3\n"
    )
    return folder


def own_command(out: Path, own_task: Path, sft: str = "sft.yaml") -> list[str]:
    configs = ["--sft_config", str(own_task / sft), "--grpo_config", str(own_task / "grpo.yaml")]
    return ["compare", "--output_dir", str(out), *configs, "--seeds", "0", "--num_samples", "1"]


@pytest.mark.parametrize(("kind", "reason"), [("raise", "a fault in the reward"), ("exit", "its process died")])
def test_a_failed_run_loses_no_other(own_task, tmp_path, capsys, request, kind, reason):
    if kind == "raise":
        request.getfixturevalue("in_process")
    out = tmp_path / "runs"
    command = [*own_command(out, own_task), "--arms", FULL, "two-sided-noise"]
    (own_task / "fault").write_text(kind)
    assert main(command) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("failed:")]
    assert len(errors) == 1
    assert "seed 0, latent-grpo" in errors[0]
    assert reason in errors[0]
    assert set(results(out)) == {f"seed-0/{LATENT}", "seed-0/two-sided-noise"}
    document = json.loads((out / "comparison.json").read_text())
    assert list(document["failed"]) == ["seed 0, latent-grpo"]
    assert "## Failed runs" in (out / "comparison.md").read_text()
    assert results(out)[f"seed-0/{LATENT}"]["result"]["problems"] == 6
    if kind == "raise":
        assert main(command) == 0
        assert f"seed-0/{FULL}" in results(out)
        assert "## Failed runs" not in (out / "comparison.md").read_text()


def test_arms_of_a_failed_warm_start_are_not_run(own_task, tmp_path, capsys, in_process):
    (own_task / "plain.jsonl").write_text('{"prompt": "a", "answer": "1"}\n')
    configuration = (own_task / "sft.yaml").read_text().replace("data.jsonl", "plain.jsonl")
    (own_task / "no-chain.yaml").write_text(configuration)
    out = tmp_path / "runs"
    assert main([*own_command(out, own_task, "no-chain.yaml"), "--arms", FULL]) == 1
    errors = capsys.readouterr().err
    assert "seed 0, latent-sft: DataError: row 1 has no chain of thought" in errors
    assert "seed 0, latent-grpo: its warm start failed" in errors
    assert not results(out)
    assert not (out / "comparison.json").exists()


@pytest.mark.parametrize("given", ["sft_config", "grpo_config"])
def test_one_configuration_alone_is_refused(own_task, tmp_path, given, capsys):
    path = str(own_task / f"{given.partition('_')[0]}.yaml")
    assert main(["compare", "--output_dir", str(tmp_path / "x"), f"--{given}", path]) == 2
    assert "belong together" in capsys.readouterr().err


def test_differences_name_the_option():
    old, new = {"a": 1, "b": {"c": 2, "d": 3}}, {"a": 1, "b": {"c": 5, "d": 3}, "e": 4}
    assert list(differences(old, new)) == [("b.c", 2, 5), ("e", None, 4)]
    assert not list(differences(new, new))
