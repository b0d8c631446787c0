"""A warm start with uniform targets: its targets, its noise, its loss, and what it learns."""

from __future__ import annotations

import json

import pytest
import torch
from support.trainers import ROWS

from latent_grpo import LatentSFTConfig, LatentSFTTrainer
from latent_grpo.errors import DataError
from latent_grpo.model import Head, embedding_table
from latent_grpo.quickstart.toy_task import make_model, make_problems
from latent_grpo.sft import build_examples, collate, gold_chain_accuracy, gumbel_noise, input_mixtures, target_loss

CPU = torch.device("cpu")


def test_targets_are_groups_of_chain_tokens(tokenizer):
    args = LatentSFTConfig(compression=2, answer_template="{answer}")
    row = {"prompt": "Mia has 3 coins.", "chain": "3 7 5", "answer": "5"}
    (example,) = build_examples(tokenizer, [row], args)
    ids = tokenizer.convert_tokens_to_ids
    assert example.response == [[ids("3"), ids("7")], [ids("5")], [ids("</think>")], [ids("5")], [ids("<eos>")]]
    batch = collate([example], CPU)
    model = make_model(tokenizer, seed=0)
    mixtures, table = input_mixtures(batch, model), embedding_table(model)
    start = len(example.prompt)
    torch.testing.assert_close(mixtures[0, start], (table[ids("3")] + table[ids("7")]) / 2)
    torch.testing.assert_close(mixtures[0, start + 1], table[ids("5")])


def test_the_noise_of_an_example_does_not_depend_on_its_batch(tokenizer):
    examples = build_examples(tokenizer, make_problems(6, seed=3), LatentSFTConfig(answer_template="{answer}"))
    batch, single = collate(examples, CPU), collate(examples[4:5], CPU)
    noise, single_noise = (gumbel_noise(some, seed=7, step=2) for some in (batch, single))
    count, components = len(examples[4].response), single_noise.shape[-1]
    start, single_start = (int(some.response.int().argmax(-1)[row]) for some, row in ((batch, 4), (single, 0)))
    expected = single_noise[0, single_start : single_start + count]
    assert torch.equal(noise[4, start : start + count, :components], expected)
    used = noise[batch.weights > 0]
    assert -1.5 <= used.min() < used.max() <= 3.0
    for other in (gumbel_noise(batch, seed=8, step=2), gumbel_noise(batch, seed=7, step=3)):
        assert not torch.equal(other, noise)


def test_noise_perturbs_latent_inputs_and_no_text_inputs(tokenizer):
    examples = build_examples(tokenizer, make_problems(6, seed=3), LatentSFTConfig(answer_template="{answer}"))
    batch = collate(examples, CPU)
    model = make_model(tokenizer, seed=0)
    plain, perturbed = input_mixtures(batch, model), input_mixtures(batch, model, 0.5, 7, 2)
    latent = (batch.weights > 0).sum(-1) > 1
    assert not torch.equal(plain[latent], perturbed[latent])
    assert torch.equal(plain[~latent], perturbed[~latent])


def test_the_loss_is_the_divergence_to_the_target_and_its_gradient_is_right():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 6, generator=generator, requires_grad=True)
    head = torch.randn(11, 6, generator=generator)
    ids = torch.tensor([[2, 5], [4, 4], [7, 0]])
    weights = torch.tensor([[0.5, 0.5], [0.5, 0.5], [1.0, 0.0]])
    loss = target_loss(hidden, Head(head), ids, weights)
    log_probs = (hidden @ head.T).log_softmax(-1)
    expected = -log_probs[1, 4] - log_probs[2, 7]
    expected = expected + 0.5 * (torch.log(torch.tensor(0.5)) - log_probs[0, 2])
    expected = expected + 0.5 * (torch.log(torch.tensor(0.5)) - log_probs[0, 5])
    torch.testing.assert_close(loss, expected)
    actual_grad, expected_grad = (torch.autograd.grad(x, hidden, retain_graph=True)[0] for x in (loss, expected))
    torch.testing.assert_close(actual_grad, expected_grad)


def test_the_loss_falls_and_the_model_is_saved(tokenizer, tmp_path):
    args = LatentSFTConfig(
        output_dir=str(tmp_path / "sft"),
        max_steps=25,
        learning_rate=3e-3,
        per_device_train_batch_size=32,
        answer_template="{answer}",
        max_completion_length=16,
    )
    LatentSFTTrainer(make_model(tokenizer, seed=0), args, ROWS, tokenizer).train()
    losses = [json.loads(line)["loss"] for line in (tmp_path / "sft" / "metrics.jsonl").open()]
    assert losses[-1] < 0.7 * losses[0]
    assert (tmp_path / "sft" / "model.safetensors").exists()


def test_a_row_without_a_chain_is_refused(tokenizer):
    with pytest.raises(DataError, match="chain"):
        build_examples(tokenizer, [{"prompt": "a", "answer": "1"}], LatentSFTConfig())


def test_an_untrained_model_does_not_read_out_the_gold_chain(tokenizer):
    examples = build_examples(tokenizer, ROWS, LatentSFTConfig(answer_template="{answer}"))
    assert gold_chain_accuracy(make_model(tokenizer, seed=0), examples) < 0.2
