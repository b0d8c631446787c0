"""What a run shows and keeps: the table, trackers, the log of responses, alarms and `inspect`."""

from __future__ import annotations

import json
import math
import sys
import types
from pathlib import Path

import pytest
from pyarrow import parquet

from latent_grpo import LatentGRPOConfig, LatentGRPOTrainer, LatentSFTConfig
from latent_grpo.commands.main import main
from latent_grpo.errors import ConfigError
from latent_grpo.quickstart.toy_task import make_model, make_problems, make_tokenizer
from latent_grpo.rewards.scoring import reward_names
from latent_grpo.rollout.trajectory import visible_text
from latent_grpo.watching.alarms import ALARMS, WINDOW, Alarms
from latent_grpo.watching.inspect_run import sparkline
from latent_grpo.watching.metrics import LINES_PER_HEADING, Metrics, json_line, read_metrics
from latent_grpo.watching.response_log import completion_steps, read_completions

ROWS = make_problems(12, seed=1)


def id_reward(completion_ids, **columns):
    return [float(sum(ids) % 7) for ids in completion_ids]


def trainer(out: Path, **options) -> LatentGRPOTrainer:
    batch = dict(num_generations=4, generation_batch_size=8, group_filter=False, invalid="keep", max_steps=3)
    sampling = dict(latent_top_k=3, max_completion_length=6, temperature=1.0, top_k=0, top_p=1.0)
    base = dict(output_dir=str(out), seed=0, save_steps=0, **batch, **sampling)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed=0)
    rewards = [id_reward, "accuracy"]
    return LatentGRPOTrainer(model, rewards, LatentGRPOConfig(**{**base, **options}), ROWS, None, tokenizer)


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """Return the folder of a run whose responses are logged, and the batches that it trained on, by step."""
    out = tmp_path_factory.mktemp("watched") / "run"
    batches = {}
    run = trainer(out, log_completions=True, logging_steps=1, max_steps=3, save_steps=2)
    log = run.log_completions

    def spy(batch):
        batches[run.step] = batch
        log(batch)

    run.log_completions = spy
    run.train()
    return out, batches


def values(step: int, phase: str = "train", **figures: float) -> dict[str, float]:
    return {"phase": phase, "step": step, **figures}


def test_every_logged_step_is_a_line_of_the_table_under_its_heading(tmp_path, capsys):
    metrics = Metrics(LatentGRPOConfig(output_dir=str(tmp_path / "run")))
    for step in range(1, LINES_PER_HEADING + 2):
        metrics.write(values(step, reward=step / 100, learning_rate=1e-6, **{"completions/mean_length": 4.25}))
    metrics.close()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == LINES_PER_HEADING + 3
    assert lines[0] == lines[LINES_PER_HEADING + 1] == "  step reward length     rate Pass@1"
    assert lines[2] == "     2  0.020    4.2  1.0e-06"
    assert lines[1][: len("  step reward")].endswith("0.010")


def test_a_whole_run_prints_no_table_where_it_is_not_wanted(tmp_path, capsys):
    trainer(tmp_path / "shown", max_steps=1).train()
    assert "  step     loss reward" in capsys.readouterr().err
    trainer(tmp_path / "hidden", max_steps=1, log_table=False).train()
    assert "  step     loss reward" not in capsys.readouterr().err


def test_a_half_written_last_line_is_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}]


def test_metrics_without_a_number_are_null_in_the_file(tmp_path):
    row = {"phase": "train", "step": 1, "reward": math.nan, "kl": 0.5, "margin": -math.inf}
    (tmp_path / "metrics.jsonl").write_text(json_line(row))
    strict = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)  # called for NaN
    assert strict == {"phase": "train", "step": 1, "reward": None, "kl": 0.5, "margin": None}
    (read,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(read["reward"])
    assert read["kl"] == 0.5


class Recorder(types.ModuleType):
    """A module whose functions record their calls and return the module, so that calls on a result are recorded too."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, tuple, dict]] = []

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            return self

        return call

    def named(self, name: str) -> list[tuple[tuple, dict]]:
        return [(args, kwargs) for called, args, kwargs in self.calls if called == name]


@pytest.fixture
def recorder(monkeypatch):
    """Return a function that puts a Recorder of the given name into sys.modules."""

    def install(name: str) -> Recorder:
        module = Recorder(name)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    return install


def expected_numbers(out: Path) -> dict[int, dict[str, float]]:
    """Return what trackers must have received: the numbers of metrics.jsonl by step, each named with its phase."""
    return {
        row["step"]: {f"train/{k}": v for k, v in row.items() if k not in ("phase", "step")}
        for row in read_metrics(out / "metrics.jsonl")
    }


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_metrics_reach_the_tracker(name, recorder, tmp_path):
    module, out = recorder(name), tmp_path / "run"
    trainer(out, report_to=[name], project="mine", run_name="first").train()
    ((_, options),) = module.named("init")
    assert (options["project"], options["name"]) == ("mine", "first")
    assert options["config"]["num_generations"] == 4
    assert {kwargs["step"]: args[0] for args, kwargs in module.named("log")} == expected_numbers(out)
    assert len(module.named("finish")) == 1


def test_a_resumed_run_goes_on_in_its_trackers(recorder, tmp_path):
    wandb, trackio, out = recorder("wandb"), recorder("trackio"), tmp_path / "run"
    trainer(out, report_to=["wandb", "trackio"], max_steps=2, save_steps=1).train()
    trainer(out, report_to=["wandb", "trackio"], max_steps=3).train(resume_from_checkpoint=True)
    first, second = (options for _, options in wandb.named("init"))
    assert first["id"] == second["id"]
    assert first["resume"] == second["resume"] == "allow"
    assert [options["resume"] for _, options in trackio.named("init")] == ["never", "allow"]
    assert [kwargs["step"] for _, kwargs in trackio.named("log")] == [1, 2, 3]
    assert {options["name"] for _, options in trackio.named("init")} == {"run"}
    trainer(tmp_path / "other", report_to=["wandb"], max_steps=1).train()
    assert wandb.named("init")[-1][1]["id"] != first["id"]


def test_metrics_reach_tensorboard(recorder, tmp_path):
    module, out = recorder("torch.utils.tensorboard"), tmp_path / "run"
    trainer(out, report_to=["tensorboard"], max_steps=2, save_steps=1).train()
    ((folder,), options), *_ = module.named("SummaryWriter")
    assert Path(folder) == out / "tensorboard"
    assert options["purge_step"] is None
    written: dict[int, dict[str, float]] = {}
    for (name, value, step), _ in module.named("add_scalar"):
        written.setdefault(step, {})[name] = value
    assert written == expected_numbers(out)
    trainer(out, report_to=["tensorboard"], max_steps=3).train(resume_from_checkpoint=True)
    assert module.named("SummaryWriter")[-1][1]["purge_step"] == 3


def test_tensorboard_files_hold_the_metrics(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out = tmp_path / "run"
    trainer(out, report_to=["tensorboard"], max_steps=2).train()
    events = accumulator.EventAccumulator(str(out / "tensorboard")).Reload()
    for step, figures in expected_numbers(out).items():
        for name, value in figures.items():
            got = {event.step: event.value for event in events.Scalars(name)}
            assert got[step] == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb"), ("trackio", "trackio")]
)
def test_a_tracker_that_is_not_installed_is_one_line(name, module, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"report_to is '{name}': pip install {name}"):
        trainer(tmp_path / "run", report_to=[name]).train()
    trainer(tmp_path / "run", max_steps=1).train()


def test_an_unknown_tracker_is_refused():
    with pytest.raises(ConfigError, match="report_to is 'mlflow': choose from tensorboard, wandb, trackio"):
        LatentSFTConfig(report_to=["mlflow"])


def test_the_log_of_responses_holds_what_was_trained_on(watched):
    out, batches = watched
    assert completion_steps(out) == [1, 2, 3]
    assert not list((out / "completions").glob(".*"))
    tokenizer = make_tokenizer()
    latent_seen = 0
    for step, batch in batches.items():
        rows, rollout = read_completions(out, step), batch.rollout
        assert len(rows) == 8
        answers = {row["prompt"]: row["answer"] for row in ROWS}
        for i, row in enumerate(rows):
            assert row["step"] == step
            assert row["answer"] == answers[row["prompt"]]
            prompt = rollout.prompt_ids[rollout.prompt_index[i]][rollout.prompt_mask[rollout.prompt_index[i]].bool()]
            assert tokenizer(row["prompt"])["input_ids"] == prompt.tolist()
            assert row["reward"] == pytest.approx(row["reward/id_reward"] + row["reward/accuracy_reward"])
            assert row["reward/id_reward"] == int((rollout.token[i] * rollout.mask[i]).sum()) % 7
            length = int(rollout.mask[i].sum())
            assert row["response_length"] == length
            assert row["finished"] == bool(rollout.finished[i])
            siblings = rollout.prompt_index == rollout.prompt_index[i]
            steps = int(rollout.mask[siblings].sum())
            assert row["latent_share"] == pytest.approx(int(rollout.is_latent[siblings].sum()) / steps)
            assert row["advantage"] == pytest.approx(float(batch.advantages[i, length - 1]))
            assert row["advantage_first_step"] == pytest.approx(float(batch.advantages[i, 0]))
            where = rollout.is_latent[i].nonzero().squeeze(-1).tolist()
            assert len(row["latent_steps"]) == len(where)
            for entries, t in zip(row["latent_steps"], where, strict=True):
                latent_seen += 1
                weights = (rollout.scores[i, t] / rollout.tau).softmax(-1)
                order = weights.argsort(descending=True)
                assert [e["token"] for e in entries] == [tokenizer.decode([int(rollout.ids[i, t, k])]) for k in order]
                assert [e["weight"] for e in entries] == pytest.approx(weights[order].tolist())
        (line,) = [line for line in read_metrics(out / "metrics.jsonl") if line["step"] == step]
        of_questions = {row["prompt"]: row["latent_share"] for row in rows}
        assert line["latent/share_per_prompt"] == pytest.approx(sum(of_questions.values()) / len(of_questions))
    assert latent_seen > 0
    assert len({row["advantage"] for row in read_completions(out, 1)}) > 2


def test_a_run_of_text_logs_responses_without_latent_steps(tmp_path):
    run = trainer(tmp_path / "run", latent=False, log_completions=True)
    batch, _ = run.collect()
    run.log_completions(batch)
    rows = read_completions(tmp_path / "run", 0)
    assert all(row["latent_steps"] == [] for row in rows)
    texts = visible_text(run.tokenizer, batch.rollout, "</think>")
    assert [row["completion"] for row in rows] == texts
    assert all(texts)


def test_a_kill_while_responses_are_written_leaves_no_torn_file(tmp_path, monkeypatch):
    write = parquet.write_table

    def torn(table, path, **options):
        write(table, path, **options)
        Path(path).write_bytes(Path(path).read_bytes()[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(parquet, "write_table", torn)
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "run", log_completions=True, max_steps=1).train()
    assert completion_steps(tmp_path / "run") == []


def test_nothing_is_logged_unasked_and_responses_are_printed_on_demand(tmp_path, capsys):
    trainer(tmp_path / "run", max_steps=1).train()
    assert not (tmp_path / "run" / "completions").exists()
    capsys.readouterr()
    trainer(tmp_path / "printed", max_steps=2, logging_steps=2, num_completions_to_print=3).train()
    lines = capsys.readouterr().err.splitlines()
    prompts = [line.removeprefix("step 2: ") for line in lines if line.startswith("step 2: ")]
    assert len(prompts) == 3
    assert set(prompts) <= {row["prompt"] for row in ROWS}
    answers = [line for line in lines if line.startswith("  answer: ")]
    assert len(answers) == 3
    assert all(fact in line for line in answers for fact in ("reward ", "advantage ", "true answer "))
    assert any(line.startswith("  latent 1: ") for line in lines)


def test_rewards_of_one_name_get_a_number():
    assert reward_names([id_reward, id_reward, values]) == ["id_reward_0", "id_reward_1", "values"]


SEQUENCES = {
    "latent/mean_length": ([8.0] * 12 + [8.0 - 0.5 * i for i in range(16)], "from 8.0 to"),
    "latent/mixture_entropy": ([0.6] * 12 + [0.6 * 0.8**i for i in range(20)], "from 0.600 to"),
    "frac_reward_zero_std": ([0.4] * 5 + [1.0] * 12, "rewards agree"),
    "completions/clipped_ratio": ([0.05] * 12 + [min(1.0, 0.05 * i) for i in range(20)], "from 5% to"),
}


@pytest.mark.parametrize("metric", SEQUENCES)
def test_a_collapse_is_one_warning(metric):
    sequence, expected = SEQUENCES[metric]
    alarms, healthy = Alarms(), dict(zip(SEQUENCES, (8.0, 0.6, 0.4, 0.05), strict=True))
    lines = [
        line
        for step, value in enumerate(sequence, 1)
        for line in alarms.update(values(step, **{**healthy, metric: value}))
    ]
    assert len(lines) == 1
    assert expected in lines[0]
    assert "\n" not in lines[0]
    assert int(lines[0].split()[1].rstrip(":")) > WINDOW


def test_a_healthy_run_and_a_run_of_text_set_off_no_alarm():
    alarms = Alarms()
    for step in range(1, 101):
        swing = 1 + 0.2 * (-1) ** step
        figures = ((4 - step / 50) * swing, 0.6 * swing, 1.0 - 0.2 * (step % 3), 0.1 * swing)
        row = values(step, **dict(zip(SEQUENCES, figures, strict=True)))
        assert alarms.update(row) == []
    text = Alarms()
    for step in range(1, 101):
        figures = dict.fromkeys(SEQUENCES, 0.0)
        assert text.update(values(step, **figures)) == []
        assert text.update(values(step, phase="sft", frac_reward_zero_std=1.0)) == []


def test_every_metric_with_an_alarm_is_one_of_a_run(watched):
    (row, *_) = read_metrics(watched[0] / "metrics.jsonl")
    assert {alarm.metric for alarm in ALARMS} <= row.keys()


def test_a_run_prints_its_alarms_once_even_when_resumed(tmp_path, capsys):
    args = LatentGRPOConfig(output_dir=str(tmp_path / "run"))
    metrics = Metrics(args)
    for step in range(1, 21):
        metrics.write(values(step, frac_reward_zero_std=1.0))
    metrics.close()
    assert capsys.readouterr().err.count("warning: step 10: rewards agree") == 1
    resumed = Metrics(args, metrics.history)
    resumed.write(values(21, frac_reward_zero_std=1.0))
    resumed.close()
    assert "warning" not in capsys.readouterr().err


def test_inspect_shows_curves_alarms_and_latent_steps(watched, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    out, _ = watched
    picture = tmp_path / "curves.png"
    assert main(["inspect", str(out), "--samples", "8", "--step", "2", "--png", str(picture)]) == 0
    shown = capsys.readouterr().out
    rows = read_metrics(out / "metrics.jsonl")
    line = next(line for line in shown.splitlines() if line.startswith("reward "))
    assert f"{rows[0]['reward']:.3g}" in line
    assert line.split()[-1] == sparkline([row["reward"] for row in rows], 40)
    assert "train step 3; checkpoint-2" in shown
    assert shown.count("step 2: ") == 8
    for row in read_completions(out, 2):
        assert row["prompt"] in shown
        assert f"latent share of the question {row['latent_share']:.2f}" in shown
        for number, entries in enumerate(row["latent_steps"], 1):
            mixture = " + ".join(f"{e['weight']:.2f} {e['token']!r}" for e in entries[:4])
            assert f"latent {number}: {mixture}" in shown
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_inspect_works_on_what_a_killed_run_left(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(values(i, frac_reward_zero_std=1.0, reward=0.5)) + "\n" for i in range(1, 15))
        + '{"phase": "tr'
    )
    assert main(["inspect", str(tmp_path)]) == 0
    shown = " ".join(capsys.readouterr().out.split())  # a long path breaks the line
    assert "train step 14" in shown
    assert "rewards agree within every group" in shown
    assert "No responses were logged" in shown


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["{here}/none"], "is not a run"),
        (["{run}", "--step", "99"], "cannot be read"),
        (["{run}", "--samples", "-1"], "samples is -1"),
        (["{run}", "--top", "0"], "top is 0"),
    ],
)
def test_mistakes_in_inspect_are_one_line(arguments, match, watched, tmp_path, capsys):
    assert main(["inspect", *(argument.format(here=tmp_path, run=watched[0]) for argument in arguments)]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("latent-grpo")]
    assert len(errors) == 1
    assert match in errors[0]


def test_sparklines_go_from_lowest_to_highest_within_their_width():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 40) == "▁▂▃▄▅▆▇█"
    assert sparkline([2.0, 2.0], 40) == "▁▁"
    assert sparkline([0.0, float("nan"), 1.0], 40) == "▁ █"
    assert len(sparkline(list(range(1000)), width=40)) == 40
