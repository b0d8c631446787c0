"""Every option of `train` and `sft` changes what it says it changes."""

from __future__ import annotations

import copy
import json
import sys
import types
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from latent_grpo import LatentGRPOConfig, LatentGRPOTrainer, LatentSFTConfig, LatentSFTTrainer
from latent_grpo import sft as sft_module
from latent_grpo.commands.main import main
from latent_grpo.config import LatentSampling
from latent_grpo.model import body, embedding_table, encode_prompts, end_marker_ids, lm_head, positions
from latent_grpo.quickstart.toy_task import make_model, make_problems, make_tokenizer
from latent_grpo.rollout import decoder as decoding_module
from latent_grpo.rollout.generate import generate_latent
from latent_grpo.saving.checkpoint import checkpoints_in
from latent_grpo.sft import build_examples
from latent_grpo.update.optimizer import make_optimizer
from latent_grpo.update.replay import replay_logprob
from latent_kernels import LatentStepOptions, latent_step_from_logits

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = make_problems(16, seed=1)
KINDS = pytest.mark.parametrize("kind", ["train", "sft"])
RATE = 1e-3


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    """The model that every trainer gets a copy of."""
    return make_model(tokenizer, seed=0)


@pytest.fixture(scope="module")
def folder(tokenizer, model, tmp_path_factory):
    """A folder with the model, data of the known format, and data of unknown columns."""
    path = tmp_path_factory.mktemp("options")
    model.save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")
    odd = [{"riddle": row["prompt"], "thoughts": row["chain"], "result": row["answer"]} for row in ROWS]
    for name, rows in {"data": ROWS, "held_out": make_problems(5, seed=2), "odd": odd}.items():
        (path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def start(tokenizer, model, tmp_path):
    """`start(kind, reward=..., model=..., rows=..., **options)` makes the trainer of a short run."""

    def make(kind, reward=None, model=model, rows=ROWS, **options):
        common = dict(output_dir=str(tmp_path / "run"), max_steps=1, learning_rate=RATE, log_table=False, save_steps=0)
        model = model if isinstance(model, str) else copy.deepcopy(model)
        if kind == "sft":
            args = LatentSFTConfig(**{**common, "answer_template": "{answer}", **options})
            return LatentSFTTrainer(model, args, rows, tokenizer)
        rollouts = dict(
            latent_top_k=2, num_generations=4, generation_batch_size=8, max_completion_length=4, group_filter=False,
            invalid="keep",
        )  # fmt: skip
        args = LatentGRPOConfig(**{**common, **rollouts, **options})
        return LatentGRPOTrainer(model, reward or spread, args, rows, None, tokenizer)

    return make


def spread(prompts, **columns):
    """A reward that differs within every group of four."""
    return [float(i % 4) for i in range(len(prompts))]


def metrics(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def optimizer_steps(trainer) -> list[tuple[float, float]]:
    """The learning rate and the gradients' norm of every optimizer step that `trainer` is about to take."""
    taken = []

    def note(optimizer, args, kwargs):
        (group,) = optimizer.param_groups
        gradients = [p.grad.flatten() for p in group["params"] if p.grad is not None]
        taken.append((group["lr"], float(torch.cat(gradients).norm())))

    trainer.updater.optimizer.register_step_pre_hook(note)
    return taken


def spy(monkeypatch, module, name) -> list[tuple[tuple, dict, object]]:
    """Arguments, options (tensors as they were) and result of every call of a module's function."""
    calls = []
    function = getattr(module, name)

    def call(*args, **options):
        given = options | {k: v for x in args if isinstance(x, LatentStepOptions) for k, v in vars(x).items()}
        before = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
        found = function(*args, **options)
        calls.append((args, before, found))
        return found

    monkeypatch.setattr(module, name, call)
    return calls


# Sampling


@pytest.mark.parametrize(
    "options",
    [dict(latent_top_p=0.3), dict(tau=0.4), dict(noise_scale=0.25), dict(noise="two_sided"), dict(latent_top_k=3)],
    ids=str,
)
def test_options_of_the_latent_step_reach_every_step_of_a_rollout(options, start, monkeypatch):
    trainer = start("train", **options)
    calls = spy(monkeypatch, decoding_module, "latent_step_with_logits")
    trainer.collect()
    (name, value), *_ = options.items()
    assert len(calls) > 1
    assert {given[name.removeprefix("latent_") if "top" in name else name] for _, given, _ in calls} == {value}


def sampling_of(tokenizer, **options) -> LatentSampling:
    base = dict(
        latent_top_k=2, latent_top_p=0.9, max_new_tokens=4, end_token_id=end_marker_ids(tokenizer, "</think>")[0],
        eos_token_id=tokenizer.eos_token_id, seed=5,
    )  # fmt: skip
    return LatentSampling(**{**base, **options})


@pytest.mark.parametrize(
    "options",
    [dict(), dict(latent_top_p=0.1), dict(noise_scale=0.25), dict(noise="two_sided"), dict(noise="none"),
     dict(latent_top_k=4)],
    ids=str,
)  # fmt: skip
def test_the_first_latent_step_of_a_rollout_is_the_operators(options, tokenizer, model):
    ids, mask = encode_prompts(tokenizer, [row["prompt"] for row in ROWS[:4]], model.device)
    sampling = sampling_of(tokenizer, **options)
    rollout = generate_latent(model, ids, mask, sampling, num_generations=2)
    with torch.no_grad():
        hidden = body(model, embedding_table(model)[ids], mask, positions(mask))[:, -1].repeat_interleave(2, 0)

    def operator(sampling):
        return latent_step_from_logits(
            hidden @ lm_head(model).T, embedding_table(model), top_k=sampling.latent_top_k,
            top_p=sampling.latent_top_p, tau=sampling.tau, noise=sampling.noise, noise_scale=sampling.noise_scale,
            seed=5, step=0, end_token_id=sampling.end_token_id,
        )  # fmt: skip

    expected = operator(sampling)
    assert rollout.is_latent[:, 0].all()
    assert torch.equal(rollout.ids[:, 0], expected.ids)
    torch.testing.assert_close(rollout.scores[:, 0], expected.scores)
    if options:
        other = operator(sampling_of(tokenizer))
        assert other.scores.shape != expected.scores.shape or not torch.equal(other.scores, expected.scores)


def test_sampled_mixtures_have_the_temperature_that_the_replay_gives_them(start):
    trainer = start("train", tau=0.3)
    rollout = trainer.collect()[0].rollout
    with torch.no_grad():
        replayed, other = (
            replay_logprob(trainer.model, part, trainer.args.temperature)
            for part in (rollout, replace(rollout, tau=1.0))
        )
    assert rollout.tau == 0.3
    torch.testing.assert_close(replayed, rollout.logprob, rtol=0, atol=1e-4)
    assert (other - rollout.logprob).abs().max() > 1e-3


def test_noise_of_a_bfloat16_rollout_does_not_depend_on_the_batch(tokenizer, model, monkeypatch):
    model = copy.deepcopy(model).bfloat16()
    ids, mask = encode_prompts(tokenizer, [row["prompt"] for row in ROWS[:4]], model.device)
    table = embedding_table(model)
    drawn, rollouts = [], []
    for prompts in (slice(0, 4), slice(2, 3)):
        with monkeypatch.context() as patch:
            calls = spy(patch, decoding_module, "latent_step_with_logits")
            streams = torch.arange(8).view(4, 2)[prompts].flatten()
            rollout = generate_latent(
                model, ids[prompts], mask[prompts], sampling_of(tokenizer), num_generations=2, row_ids=streams
            )
        noise = {}
        for _, given, (_, logits) in calls:
            for row, (stream, step) in enumerate(zip(given["row_ids"].tolist(), given["step"].tolist(), strict=True)):
                noise.setdefault((stream, step), (int(given["seed"]), logits[row].clone()))
        drawn.append(noise)
        rollouts.append(dict(zip(streams.tolist(), range(len(streams)), strict=True)) | {"rollout": rollout})
    compared = 0
    for stream in (4, 5):
        for noise, found in zip(drawn, rollouts, strict=True):
            rollout, row = found["rollout"], found[stream]
            for step in range(int(rollout.latent_steps[row])):
                seed, logits = noise[stream, step]
                alone = latent_step_from_logits(
                    logits.unsqueeze(0), table, top_k=2, top_p=0.9, seed=5, step=step, row_ids=torch.tensor([stream])
                )
                assert seed == 5
                assert torch.equal(rollout.ids[row, step], alone.ids[0])
                torch.testing.assert_close(rollout.scores[row, step], alone.scores[0])
                compared += 1
    assert compared >= 8


# Advantages and rewards

REWARDS = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 2.0])


def prepared(trainer):
    """A batch whose groups have the rewards REWARDS, with the advantages that the trainer gives it."""
    return trainer.prepare(trainer.collector.sample(trainer.model).rollout, REWARDS)[0]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (dict(first_token="best_of_correct"), "the best and those below the mean"),
        (dict(first_token="best_of_group"), "the best"),
        (dict(first_token="all"), "all"),
        (dict(latent=False), "all"),
    ],
    ids=str,
)
def test_the_first_step_of_a_response_learns_from_those_that_first_token_chooses(options, kept, start):
    batch = prepared(start("train", **options))
    lengths = batch.rollout.mask.sum(-1)
    likelihood = (batch.old_logprob * batch.rollout.mask).sum(-1) / lengths
    groups = REWARDS.view(2, 4)
    advantages = (groups - groups.mean(-1, keepdim=True)) / (groups.std(-1, keepdim=True) + 1e-6)
    expected = advantages.clone()
    for group, chances in zip(expected, likelihood.view(2, 4), strict=True):
        positive = [i for i in range(4) if group[i] > 0]
        best = max(positive, key=lambda i: chances[i])
        for i in range(4):
            if i != best and (kept == "the best" or (kept != "all" and i in positive)):
                group[i] = 0.0
    torch.testing.assert_close(batch.advantages[:, 0], expected.flatten())
    torch.testing.assert_close(batch.advantages[:, 1], advantages.flatten())


@pytest.mark.parametrize("scale", ["none", "group"])
def test_advantages_are_divided_by_the_deviation_of_a_group_unless_told(scale, start):
    batch = prepared(start("train", scale_rewards=scale, first_token="all"))
    groups = REWARDS.view(2, 4)
    expected = groups - groups.mean(-1, keepdim=True)
    if scale == "group":
        expected /= groups.std(-1, keepdim=True) + 1e-6
    torch.testing.assert_close(batch.advantages, expected.view(8, 1).expand_as(batch.advantages))


@pytest.mark.parametrize(("weights", "reward"), [(None, 11.0), ([1.0, 2.0], 21.0), ([0.5, 0.0], 0.5)])
def test_the_reward_is_the_weighted_sum_of_the_functions(weights, reward, start, tmp_path):
    functions = [lambda prompts, **columns: [1.0] * len(prompts), lambda prompts, **columns: [10.0] * len(prompts)]
    start("train", functions, reward_weights=weights).train()
    assert [row["reward"] for row in metrics(tmp_path / "run")] == [reward]


# Updates


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        (dict(), 1),
        (dict(num_iterations=3), 3),
        (dict(per_device_train_batch_size=2), 4),
        (dict(per_device_train_batch_size=2, gradient_accumulation_steps=2), 2),
        (dict(per_device_train_batch_size=2, gradient_accumulation_steps=4), 1),
        (dict(per_device_train_batch_size=4, num_iterations=2), 4),
    ],
    ids=str,
)
def test_a_rollout_of_eight_responses_takes_as_many_optimizer_steps_as_asked_for(options, steps, start):
    trainer = start("train", **options)
    taken = optimizer_steps(trainer)
    trainer.train()
    assert len(taken) == steps


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_warm_start_accumulates_gradients_over_passes(accumulation, start, monkeypatch):
    trainer = start("sft", max_steps=2, per_device_train_batch_size=3, gradient_accumulation_steps=accumulation)
    taken, passes = optimizer_steps(trainer), spy(monkeypatch, sft_module, "collate")
    trainer.train()
    assert len(taken) == 2
    assert [len(examples) for (examples, _), _, _ in passes] == [3] * 2 * accumulation


SCHEDULES = {
    "constant": (dict(lr_scheduler_type="constant"), [1.0, 1.0, 1.0, 1.0]),
    "default with warm-up": (dict(warmup_steps=2), [0.0, 0.5, 1.0, 1.0]),
    "linear": (dict(lr_scheduler_type="linear"), [1.0, 0.75, 0.5, 0.25]),
    "linear with warm-up": (dict(lr_scheduler_type="linear", warmup_steps=2), [0.0, 0.5, 1.0, 0.5]),
    "cosine": (dict(lr_scheduler_type="cosine"), [1.0, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4]),
}


@KINDS
@pytest.mark.parametrize(("options", "shares"), SCHEDULES.values(), ids=SCHEDULES.keys())
def test_the_learning_rate_follows_its_schedule(options, shares, kind, start, tmp_path):
    trainer = start(kind, max_steps=4, **options)
    taken = optimizer_steps(trainer)
    trainer.train()
    assert [rate for rate, _ in taken] == pytest.approx([RATE * share for share in shares])
    logged = [row["learning_rate"] for row in metrics(tmp_path / "run")]
    if kind == "train" and logged != [rate for rate, _ in taken]:
        assert logged[:-1] == [rate for rate, _ in taken[1:]]  # the rate after the update
    else:
        assert logged == [rate for rate, _ in taken]


def test_a_schedule_goes_over_all_passes_over_all_rollouts(start):
    trainer = start(
        "train", max_steps=2, num_iterations=2, per_device_train_batch_size=4, lr_scheduler_type="linear"
    )  # fmt: skip
    taken = optimizer_steps(trainer)
    trainer.train()
    assert [rate for rate, _ in taken] == pytest.approx([RATE * (8 - step) / 8 for step in range(8)])


@KINDS
@pytest.mark.parametrize("limit", [0.0, 1e-3, 1e6])
def test_gradients_are_clipped_to_max_grad_norm(limit, kind, start):
    trainer = start(kind, max_grad_norm=limit)
    taken = optimizer_steps(trainer)
    trainer.train()
    ((_, norm),) = taken
    before = trainer.metrics.history[0]["grad_norm"]
    assert before > 0.01
    assert norm == pytest.approx(limit if limit == 1e-3 else before, rel=1e-4)


@KINDS
def test_options_of_the_optimizer_reach_adamw(kind, start):
    options = dict(weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.95, learning_rate=2e-4, optim="adamw_torch")
    optimizer = start(kind, lr_scheduler_type="constant", **options).updater.optimizer
    assert type(optimizer) is torch.optim.AdamW
    for group in optimizer.param_groups:
        assert (group["weight_decay"], group["betas"], group["lr"]) == (0.1, (0.8, 0.95), 2e-4)


def test_the_optimizer_is_the_one_that_optim_names(monkeypatch):
    class AdamW8bit(torch.optim.AdamW):
        pass

    package, module = types.ModuleType("bitsandbytes"), types.ModuleType("bitsandbytes.optim")
    module.AdamW8bit = package.optim = AdamW8bit
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", module)
    parameters = [torch.nn.Parameter(torch.zeros(2))]
    for name, kind in (("adamw_torch", torch.optim.AdamW), ("adamw_8bit", AdamW8bit)):
        assert type(make_optimizer(parameters, LatentSFTConfig(optim=name))) is kind


@KINDS
@pytest.mark.parametrize("frozen", [True, False])
def test_the_embedding_table_is_trained_unless_frozen(frozen, kind, start, model):
    trainer = start(kind, freeze_embeddings=frozen)
    trainer.train()
    assert torch.equal(embedding_table(trainer.model), embedding_table(model)) == frozen
    changed = [not torch.equal(a, b) for a, b in zip(trainer.model.parameters(), model.parameters(), strict=True)]
    assert any(changed)


def test_the_reference_model_is_read_from_the_folder_and_stays_as_it_is(folder, model, start, tmp_path):
    trainer = start("train", model=str(folder / "model"), beta=0.1, max_steps=2, learning_rate=1e-2)
    trainer.train()
    first, second = metrics(tmp_path / "run")
    assert first["kl"] == pytest.approx(0.0, abs=1e-5)
    assert second["kl"] > 1e-4
    batch = prepared(trainer)
    with torch.no_grad():
        initial, trained = (replay_logprob(m, batch.rollout, trainer.args.temperature) for m in (model, trainer.model))
    torch.testing.assert_close(batch.ref_logprob, initial, rtol=0, atol=1e-4)
    assert (trained - initial).abs().max() > 0.01
    assert start("train", model=str(folder / "model"), beta=0.0).reference is None


# Length of a run, checkpoints, terminal


@pytest.mark.parametrize(
    ("kind", "options", "steps"),
    [
        ("train", dict(num_train_epochs=1.0), 8),  # 16 prompts, 2 a rollout
        ("train", dict(num_train_epochs=2.5), 20),
        ("train", dict(num_train_epochs=0.5), 4),
        ("train", dict(num_train_epochs=0.01), 1),
        ("train", dict(num_train_epochs=2.5, max_steps=3), 3),
        ("sft", dict(num_train_epochs=1.0), 4),  # 16 examples, 4 a step
        ("sft", dict(num_train_epochs=2.5), 10),
        ("sft", dict(num_train_epochs=0.01), 1),
        ("sft", dict(num_train_epochs=1.0, gradient_accumulation_steps=2), 2),
        ("sft", dict(num_train_epochs=2.5, max_steps=3), 3),
    ],
    ids=str,
)
def test_a_run_is_as_long_as_its_epochs_unless_max_steps_says_otherwise(kind, options, steps, start):
    options = {"max_steps": -1, "per_device_train_batch_size": 4, **options}
    assert start(kind, **options).total_steps == steps


@KINDS
@pytest.mark.parametrize(("every", "saved"), [(0, []), (2, [2, 4]), (3, [3])])
def test_checkpoints_are_written_every_save_steps(every, saved, kind, start, tmp_path):
    start(kind, max_steps=4, save_steps=every, max_completion_length=8).train()
    assert [path.name for path in checkpoints_in(tmp_path / "run")] == [f"checkpoint-{step}" for step in saved]


@KINDS
@pytest.mark.parametrize("shown", [True, False])
def test_figures_are_on_the_terminal_unless_log_table_is_off(shown, kind, start, tmp_path, capsys):
    start(kind, log_table=shown).train()
    printed = capsys.readouterr().err
    rate = f"{metrics(tmp_path / 'run')[0]['learning_rate']:.1e}"
    assert [word in printed for word in ("grad", "rate", rate)] == [shown] * 3


# The warm start


def test_a_warm_start_adds_gumbel_noise_to_its_inputs(start, monkeypatch, tmp_path):
    losses = []
    for scale in (0.0, 0.7):
        with monkeypatch.context() as patch:
            calls = spy(patch, sft_module, "input_mixtures")
            trainer = start("sft", gumbel_scale=scale, seed=3, max_steps=2, output_dir=str(tmp_path / f"run{scale}"))
            trainer.train()
        assert [args[2:] for args, _, _ in calls] == [(scale, 3, 0), (scale, 3, 1)]
        losses.append(trainer.metrics.history[0]["loss"])
    assert abs(losses[0] - losses[1]) > 1e-6


@pytest.mark.parametrize(("options", "width"), [(dict(latent=False), 1), (dict(), 2), (dict(compression=3), 3)])
def test_a_text_warm_start_keeps_the_chain_a_token_at_a_time(options, width, tokenizer):
    for row, example in zip(ROWS, build_examples(tokenizer, ROWS, LatentSFTConfig(**options)), strict=True):
        chain = tokenizer.convert_tokens_to_ids(row["chain"].split())
        latents = [chain[i : i + width] for i in range(0, len(chain), width)]
        assert example.response[: len(latents)] == latents
        assert all(len(element) == 1 for element in example.response[len(latents) :])


# Data and model by flags


@pytest.fixture
def received(monkeypatch):
    """What the commands give to their trainers, which train nothing here."""
    found = {}

    class Trainer:
        def __init__(self, *given):
            found["given"] = given

        def train(self):
            return {"loss": 0.0, "reward": 0.0}

    monkeypatch.setattr("latent_grpo.trainer.LatentGRPOTrainer", Trainer)
    monkeypatch.setattr("latent_grpo.sft.LatentSFTTrainer", Trainer)
    return found


def flags(command: str, folder, data: str = "data", **options) -> list[str]:
    given = {"model_name_or_path": folder / "model", "dataset": folder / f"{data}.jsonl", **options}
    return [command, *(word for name, value in given.items() for word in (f"--{name}", str(value)))]


COLUMNS = {"prompt_column": "riddle", "answer_column": "result", "chain_column": "thoughts"}


@KINDS
@pytest.mark.parametrize("limit", [None, 3])
def test_columns_and_limit_of_the_data_are_flags(limit, kind, folder, received):
    more = {} if limit is None else {"limit": limit}
    assert main(flags(kind, folder, "odd", **COLUMNS, **more)) == 0
    rows = received["given"][{"train": 3, "sft": 2}[kind]]
    assert rows == ROWS[:limit]


@KINDS
@pytest.mark.parametrize("missing", ["prompt_column", "answer_column"])
def test_data_of_unknown_columns_need_their_names(missing, kind, folder, received, capsys):
    columns = {name: column for name, column in COLUMNS.items() if name != missing}
    assert main(flags(kind, folder, "odd", **columns)) == 2
    assert missing in capsys.readouterr().err
    assert not received


@KINDS
def test_the_split_of_the_data_is_a_flag(kind, folder, received, monkeypatch):
    asked = []
    monkeypatch.setattr("latent_grpo.data.rows.load_rows", lambda _, **options: asked.append(options["split"]) or ROWS)
    assert main(flags(kind, folder, dataset_split="validation")) == 0
    assert asked == ["validation"]


@pytest.mark.parametrize(("limit", "problems"), [(None, 5), (3, 3)])
def test_held_out_problems_are_evaluated_every_eval_steps(limit, problems, folder, tmp_path):
    more = {} if limit is None else {"eval_limit": limit}
    arguments = flags(
        "train", folder, output_dir=tmp_path / "run", max_steps=5, eval_steps=2,
        eval_dataset=folder / "held_out.jsonl", latent_top_k=2, num_generations=4, generation_batch_size=4,
        max_completion_length=3, group_filter=False, log_table=False, **more,
    )  # fmt: skip
    assert main(arguments) == 0
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows if "eval_pass_at_1" in row] == [2, 4]
    assert [row["eval_problems"] for row in rows if "eval_problems" in row] == [problems] * 2


@KINDS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_model_is_trained_and_saved_in_the_precision_asked_for(dtype, kind, folder, tmp_path):
    arguments = flags(
        kind, folder, output_dir=tmp_path / "run", max_steps=1, dtype=dtype, max_completion_length=16, limit=4,
        log_table=False,
    )  # fmt: skip
    if kind == "train":
        small = ["--latent_top_k=2", "--num_generations=4", "--generation_batch_size=4", "--no_group_filter"]
        arguments += [*small, "--max_completion_length=3"]
    assert main(arguments) == 0
    tensors = load_file(tmp_path / "run" / "model.safetensors")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {f"torch.{dtype}"}


def test_a_prompt_over_max_prompt_length_is_refused_in_one_line(folder, tmp_path, capsys):
    small = dict(latent_top_k=2, num_generations=4, generation_batch_size=4, max_completion_length=3, max_steps=1)
    assert main(flags("train", folder, output_dir=tmp_path / "run", max_prompt_length=3, **small)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("latent-grpo")]
    assert "over max_prompt_length 3" in line


def test_a_warm_start_drops_rows_over_max_prompt_length(tokenizer, start):
    lengths = [len(tokenizer(row["prompt"])["input_ids"]) for row in ROWS]
    limit = sorted(lengths)[len(ROWS) // 2]
    wanted = [number for number, length in enumerate(lengths, 1) if length <= limit]
    assert 0 < len(wanted) < len(ROWS)
    assert [example.number for example in start("sft", max_prompt_length=limit).examples] == wanted
    assert len(start("sft").examples) == len(ROWS)
