"""What the trainer gives to reward functions: the whole response, the progress, the logs; and rewards that are None."""

from __future__ import annotations

import json
import re

import pytest
import torch
from support.trainers import ROWS, even, grpo

from latent_grpo.errors import RewardError
from latent_grpo.watching.response_log import read_completions


def think_format(completions, **columns):
    """Reward the format that TRL's reward of this name checks, in the same words."""
    texts = [each if isinstance(each, str) else each[0]["content"] for each in completions]
    return [float(bool(re.match(r"^<think>(?!.*<think>)(.*?)</think>.*$", text, re.DOTALL))) for text in texts]


def rewards_of(trainer):
    return trainer.collector.sample(trainer.full_model)


def test_a_reward_of_the_format_sees_the_latent_run(tokenizer, warm, tmp_path):
    trainer = grpo(tmp_path, tokenizer, think_format, warm, max_completion_length=4)
    groups = rewards_of(trainer)
    rollout = groups.rollout
    # The marker ends the latent run, so that every response with a text step has the format.
    ended = (~rollout.is_latent & rollout.mask).any(-1)
    assert rollout.is_latent.any()
    assert ended.any()
    assert groups.rewards.tolist() == ended.float().tolist()


@pytest.mark.parametrize("chat", [False, True])
def test_functions_get_the_whole_response_and_the_visible_text(tokenizer, warm, tmp_path, chat):
    seen = {}

    def look(prompts, completions, visible_text, completion_ids, **columns):
        seen.update(columns, prompts=prompts, completions=completions, visible=visible_text, ids=completion_ids)
        return [0.0] * len(prompts)

    rows = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in ROWS] if chat else ROWS
    trainer = grpo(tmp_path, tokenizer, [look, "accuracy"], warm, rows)
    groups = rewards_of(trainer)
    rollout = groups.rollout
    for i, completion in enumerate(seen["completions"]):
        text = completion[0]["content"] if chat else completion
        assert chat == (completion == [{"role": "assistant", "content": text}])
        latent = tokenizer.decode(rollout.token[i][rollout.is_latent[i]].tolist())
        end = "</think>" if (~rollout.is_latent[i] & rollout.mask[i]).any() else ""
        assert text == f"<think>{latent}{end}{seen['visible'][i]}"
        assert seen["ids"][i] == rollout.token[i][rollout.mask[i]].tolist()
    assert groups.samples.completions == seen["visible"]
    right = [float(text == row) for text, row in zip(seen["visible"], groups.samples.answers, strict=True)]
    assert groups.samples.rewards["accuracy_reward"] == right


def test_visible_completions_on_request(tokenizer, warm, tmp_path):
    def look(completions, visible_text, **columns):
        assert list(completions) == list(visible_text)
        return [0.0] * len(completions)

    rewards_of(grpo(tmp_path, tokenizer, look, warm, reward_completions="visible"))


@pytest.mark.parametrize("opened", [False, True])
def test_a_text_response_begins_with_the_opening_that_its_prompt_ends_in(tokenizer, warm, tmp_path, opened):
    seen = []

    def look(completions, visible_text, **columns):
        seen.extend(zip(completions, visible_text, strict=True))
        return [0.0] * len(completions)

    options = {"opening_marker": " coins"} if opened else {}  # any word of the tokenizer opens as well as <think>
    rewards_of(grpo(tmp_path, tokenizer, look, warm, latent=False, **options))
    begin = "coins" if opened else ""
    assert all(whole in (begin + visible, visible, f"{begin}</think>{visible}") for whole, visible in seen)
    assert all(whole.startswith(begin) for whole, _ in seen)


def test_functions_get_the_progress_and_log_columns_and_metrics(tokenizer, warm, tmp_path):
    states = []

    def watch(completions, trainer_state, log_extra, log_metric):
        states.append((trainer_state.global_step, trainer_state.max_steps, len(trainer_state.log_history)))
        log_extra("words", [len(str(text).split()) for text in completions])
        log_metric("longest", max(len(str(text)) for text in completions))
        return even(completions)

    trainer = grpo(tmp_path, tokenizer, watch, warm, max_steps=2, log_completions=True, reward_completions="visible")
    trainer.train()
    assert states == [(0, 2, 0), (1, 2, 1)]
    for step in (1, 2):
        rows = read_completions(tmp_path / "run", step)
        assert [row["words"] for row in rows] == [len(row["completion"].split()) for row in rows]
        line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()[step - 1])
        assert line["longest"] == max(len(row["completion"]) for row in rows)
        assert line["rewards/watch/mean"] == pytest.approx(sum(row["reward/watch"] for row in rows) / len(rows))


def test_the_progress_counts_optimizer_steps_as_in_trl(tokenizer, warm, tmp_path):
    states = []

    def watch(completions, trainer_state):
        states.append((trainer_state.global_step, trainer_state.max_steps))
        return even(completions)

    trainer = grpo(tmp_path, tokenizer, watch, warm, max_steps=3, num_iterations=2)
    trainer.train()
    assert states == [(0, 3), (2, 3)]
    assert trainer.updater.updates == 3


def test_a_column_of_the_log_is_not_overwritten(tokenizer, warm, tmp_path):
    def overwrite(completions, log_extra):
        log_extra("prompt", [0] * len(completions))
        return even(completions)

    trainer = grpo(tmp_path, tokenizer, overwrite, warm, log_completions=True)
    with pytest.raises(RewardError, match=r"log_extra\('prompt', ...\) has the name of a column"):
        trainer.train()


@pytest.mark.parametrize("name", ["step", "phase", "loss", "eval_pass_at_1"])
def test_a_metric_of_the_run_is_not_overwritten(tokenizer, warm, tmp_path, name):
    def overwrite(completions, log_metric):
        log_metric(name, 7)
        return even(completions)

    trainer = grpo(tmp_path, tokenizer, overwrite, warm, log_table=False)
    with pytest.raises(RewardError, match=rf"log_metric\('{name}', ...\) has the name of a metric of the run"):
        trainer.train()


@pytest.mark.parametrize("invalid", ["exclude", "zero", "keep"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.filterwarnings("ignore:every reward function returned None")
def test_a_response_without_a_reward_reaches_no_sum(tokenizer, warm, tmp_path, invalid, scale):
    def some(completions, **columns):
        # Groups of four: one without any reward, one with one, one with three of which two agree, one complete.
        values = [None] * 4 + [None, None, 1.0, None] + [None, 1.0, 0.0, 0.0] + [0.0, 1.0, 0.0, 1.0]
        return values[: len(completions)]

    options = dict(group_filter=False, invalid=invalid, scale_rewards=scale, first_token="all")
    trainer = grpo(tmp_path, tokenizer, some, warm, **options)
    groups = rewards_of(trainer)
    groups.rollout.finished[:] = True
    batch, _ = trainer.prepare(groups.rollout, groups.rewards)
    advantages = batch.advantages[:, -1]
    rewards = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0, 1.0])
    counted = torch.cat(rewards)
    spread = {"group": [r.std() for r in rewards], "batch": [counted.std()] * 2, "none": [torch.tensor(1.0)] * 2}[scale]
    expected = [(r - r.mean()) / s for r, s in zip(rewards, spread, strict=True)]
    assert advantages[:9].tolist() == [0.0] * 9
    torch.testing.assert_close(advantages[9:], torch.cat(expected), atol=1e-5, rtol=1e-5)
    kept = trainer.collector
    trainer.args.group_filter = True
    assert kept.groups_to_keep(groups.rewards, 4).tolist() == [False, False, True, True]


@pytest.mark.filterwarnings("ignore:every reward function returned None")
def test_metrics_leave_out_what_has_no_reward(tokenizer, warm, tmp_path):
    def half(completions, **columns):
        return [float(i % 4 == 1) if i % 2 else None for i in range(len(completions))]

    trainer = grpo(tmp_path, tokenizer, half, warm, log_completions=True)
    values = trainer.train()
    assert values["reward"] == values["rewards/half/mean"] == 0.5
    assert values["reward_std"] == pytest.approx((8 * 0.25 / 7) ** 0.5)  # of the eight that have one
    assert torch.isfinite(torch.tensor([values["loss"], values["grad_norm"]])).all()
    assert [row["reward/half"] for row in read_completions(tmp_path / "run", 1)[:4]] == [None, 1.0, None, 0.0]


def test_a_run_without_any_reward_trains_nothing(tokenizer, warm, tmp_path):
    def never(completions, **columns):
        return [None] * len(completions)

    trainer = grpo(tmp_path, tokenizer, never, warm, group_filter=True)
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    with pytest.warns(UserWarning, match="returned None for 16 of 16 completions"):
        values = trainer.train()
    assert values["loss"] == 0.0
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
