"""How prompts and responses are divided among ranks, and what a rank without work does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from support.processes import TRAIN
from support.trainers import rollout_of

from latent_grpo import LatentGRPOConfig, LatentGRPOTrainer
from latent_grpo.parallel.work_split import pad_to_count, rows_of_groups, share_of_rank, snake_draft
from latent_grpo.quickstart.toy_task import make_model, make_problems, make_tokenizer

trainer_module = sys.modules["latent_grpo.trainer"]


def test_the_rows_of_groups_follow_the_order_of_the_groups() -> None:
    assert rows_of_groups(torch.tensor([2, 0]), 3).tolist() == [6, 7, 8, 0, 1, 2]


def test_a_snake_draft_gives_equal_counts_and_equal_lengths() -> None:
    lengths = [9, 1, 8, 2, 7, 3, 6, 4]
    shares = snake_draft(lengths, 2)
    assert sorted(index for share in shares for index in share) == list(range(8))
    assert [len(share) for share in shares] == [4, 4]
    assert [sum(lengths[index] for index in share) for share in shares] == [20, 20]
    assert snake_draft(lengths, 1) == [list(range(8))]
    assert [len(share) for share in snake_draft([5, 4, 3, 2, 1], 3)] == [1, 2, 2]


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_ranks_replay_about_as_many_tokens_and_divide_few_groups(ranks: int) -> None:
    lengths = [1 + (i * 37) % 23 for i in range(32)]
    rollout = rollout_of(lengths, [i // 4 for i in range(32)])
    rows = torch.randperm(32)
    shares = [share_of_rank(rollout, rows, rank, ranks) for rank in range(ranks)]
    assert torch.equal(torch.cat(shares).sort().values, torch.arange(32))
    tokens = [sum(lengths[i] + 0.5 for i in share.tolist()) for share in shares]  # 0.5: a prompt of 2 for 4 responses
    assert max(tokens) - min(tokens) <= 2 * (max(lengths) + 0.5)
    prompts = [set((share // 4).tolist()) for share in shares]
    assert sum(map(len, prompts)) <= 8 + ranks - 1  # a cut between two ranks divides one group at most


def test_a_rank_may_get_no_response() -> None:
    rollout = rollout_of([40, 1], [0, 0])
    shares = [share_of_rank(rollout, torch.arange(2), rank, 4) for rank in range(4)]
    assert sorted(torch.cat(shares).tolist()) == [0, 1]
    assert any(len(share) == 0 for share in shares)


def test_fillers_take_the_places_of_missing_batches() -> None:
    assert pad_to_count(["a"], "filler", 3) == [("a", True), ("filler", False), ("filler", False)]


def test_a_filler_takes_part_in_an_update_and_adds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer()
    options = {**TRAIN, "max_rollouts": 1, "log_completions": False, "output_dir": str(tmp_path / "run")}

    def reward(completion_ids, **columns):
        return [float(ids[-1] % 7) for ids in completion_ids]

    results = []
    for more in (0, 2):
        # As if another rank had more micro-batches.
        monkeypatch.setattr(trainer_module, "all_reduce_max", lambda value, more=more: value + more)
        model, rows = make_model(tokenizer, seed=0), make_problems(30, seed=1)
        trainer = LatentGRPOTrainer(model, reward, LatentGRPOConfig(**options), rows, None, tokenizer)
        batch, _ = trainer.collect()
        stats = trainer.accumulate(batch, torch.arange(16))
        results.append((stats, [p.grad for p in trainer.updater.parameters]))
    (stats, gradients), (padded_stats, padded_gradients) = results
    assert stats["loss"] != 0
    assert padded_stats == pytest.approx(stats)
    torch.testing.assert_close(padded_gradients, gradients, rtol=0, atol=0)
