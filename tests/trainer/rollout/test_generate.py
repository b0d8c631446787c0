"""Rollouts and their replay: equal log-probs, independence of the batch, the record, and text sampling."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.rollouts import EOS, SIZES, ending_early, make_model
from transformers import MistralConfig, MistralForCausalLM

from latent_grpo import LatentSampling, generate_latent
from latent_grpo.model import body, embedding_table, positions
from latent_grpo.rollout import decoder as decoding
from latent_grpo.rollout import generate as generation
from latent_grpo.rollout.trajectory import concatenate, mixture_entropy
from latent_grpo.update.loss import response_mask
from latent_grpo.update.replay import replay, replay_logprob
from latent_kernels import mix_embeddings


@pytest.fixture(scope="module", params=["llama-tied", "qwen2-untied"])
def model(request):
    return make_model(request.param)


def test_log_probs_recorded_while_sampling_equal_one_teacher_forced_pass(model, prompts):
    rollout = generate_latent(model, *prompts, ending_early(model, prompts), num_generations=4)
    assert rollout.is_latent.any()
    assert (rollout.mask & ~rollout.is_latent).any()
    gap = (replay_logprob(model, rollout, 1.0) - rollout.logprob).abs().max()
    assert gap < 1e-4


def test_replay_that_shares_prompts_equals_the_full_forward_pass(model, prompts):
    rollout = generate_latent(model, *prompts, ending_early(model, prompts), num_generations=4)
    table = embedding_table(model)
    rows, steps, width = rollout.ids.shape
    mixed = mix_embeddings(rollout.ids.view(-1, width), rollout.scores.view(-1, width), table, tau=rollout.tau)
    embeds = torch.cat([table[rollout.prompt_ids][rollout.prompt_index], mixed.view(rows, steps, -1)], 1)
    mask = torch.cat([rollout.prompt_mask[rollout.prompt_index], rollout.mask.long()], 1)
    full = body(model, embeds, mask, positions(mask))[:, rollout.prompt_ids.shape[1] - 1 : -1]
    torch.testing.assert_close(replay(model, rollout)[rollout.mask], full[rollout.mask], rtol=1e-4, atol=1e-5)


def test_replay_gradients_equal_those_of_the_full_forward_pass(prompts):
    model = make_model("llama-tied")
    rollout = generate_latent(model, *prompts, ending_early(model, prompts), num_generations=2)
    table = embedding_table(model).detach()
    rows, steps, width = rollout.ids.shape
    mixed = mix_embeddings(rollout.ids.view(-1, width), rollout.scores.view(-1, width), table, tau=rollout.tau)
    embeds = torch.cat(
        [embedding_table(model)[rollout.prompt_ids][rollout.prompt_index], mixed.view(rows, steps, -1)], 1
    )
    mask = torch.cat([rollout.prompt_mask[rollout.prompt_index], rollout.mask.long()], 1)
    full = body(model, embeds, mask, positions(mask))[:, rollout.prompt_ids.shape[1] - 1 : -1]
    grads = []
    for hidden in (replay(model, rollout), full):
        model.zero_grad()
        hidden[rollout.mask].square().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-4 * float(grads[1].abs().max()))


def test_a_row_does_not_depend_on_its_batch(model, prompts):
    options = ending_early(model, prompts)
    everything = generate_latent(model, *prompts, options, num_generations=4)
    ids, mask = prompts
    alone = generate_latent(model, ids[2:, 1:], mask[2:, 1:], options, num_generations=4, row_ids=torch.arange(8, 12))
    steps = alone.mask.shape[1]
    assert torch.equal(alone.mask, everything.mask[8:, :steps])
    assert torch.equal(alone.ids[alone.mask], everything.ids[8:, :steps][alone.mask])


def test_rows_that_wait_for_a_slot_have_the_same_trajectories(model, prompts):
    options = ending_early(model, prompts)
    whole = generate_latent(model, *prompts, options, num_generations=4)
    assert len(whole.lengths.unique()) > 1
    for max_rows in (1, 3, 5, 8):
        queued = generate_latent(model, *prompts, options, num_generations=4, max_rows=max_rows)
        assert torch.equal(queued.mask, whole.mask)
        assert torch.equal(queued.ids[queued.mask], whole.ids[whole.mask])
        torch.testing.assert_close(queued.logprob, whole.logprob, rtol=1e-4, atol=1e-4)


def test_dropping_finished_rows_changes_no_trajectory(model, prompts, monkeypatch):
    options = ending_early(model, prompts)
    dropped = generate_latent(model, *prompts, options, num_generations=4)
    monkeypatch.setattr(generation, "COMPACT_BELOW", 0.0)  # finished rows stay until all are finished
    kept = generate_latent(model, *prompts, options, num_generations=4)
    assert torch.equal(dropped.ids[dropped.mask], kept.ids[kept.mask])
    assert torch.equal(dropped.mask, kept.mask)


def test_a_prompt_is_computed_once_for_all_its_rows(model, prompts, monkeypatch):
    computed = []
    prefill = generation.body

    def counted(model, embeds, *args):
        computed.append(len(embeds))
        return prefill(model, embeds, *args)

    monkeypatch.setattr(generation, "body", counted)
    options = ending_early(model, prompts)
    computed.clear()
    together = generate_latent(model, *prompts, options, num_generations=8)
    assert computed == [3]
    ids, mask = (x.repeat_interleave(8, 0) for x in prompts)
    apart = generate_latent(model, ids, mask, options)
    assert computed == [3, 24]
    assert torch.equal(together.ids[together.mask], apart.ids[apart.mask])
    torch.testing.assert_close(together.logprob, apart.logprob, rtol=1e-4, atol=1e-4)


def test_the_cost_of_a_batch_follows_its_live_rows(model, prompts, monkeypatch):
    decoded = []
    advance = decoding.Decoder.advance

    def counted(self, state, *args):
        decoded.append(len(state.row))
        return advance(self, state, *args)

    monkeypatch.setattr(decoding.Decoder, "advance", counted)
    options = replace(ending_early(model, prompts), max_new_tokens=40)
    rollout = generate_latent(model, *prompts, options, num_generations=16)
    lengths = rollout.lengths
    assert len(lengths.unique()) > 5
    live = int((lengths - 1).sum())  # the first element comes from the prefill
    assert live <= sum(decoded) < 1.12 * live + 40


def test_sliding_window_layers_see_only_their_window(prompts):
    torch.manual_seed(3)
    config = MistralConfig(**SIZES, sliding_window=4, tie_word_embeddings=True)
    windowed = MistralForCausalLM(config).eval()
    rollout = generate_latent(windowed, *prompts, ending_early(windowed, prompts), num_generations=2)
    assert (replay_logprob(windowed, rollout, 1.0) - rollout.logprob).abs().max() < 1e-4
    full = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None, tie_word_embeddings=True)).eval()
    full.load_state_dict(windowed.state_dict())
    assert (replay_logprob(full, rollout, 1.0) - rollout.logprob).abs().max() > 1e-3


def test_max_rows_of_zero_is_refused(model, prompts):
    with pytest.raises(ValueError, match="max_rows is 0"):
        generate_latent(model, *prompts, LatentSampling(latent=False), max_rows=0)


def test_the_record_of_text_and_latent_steps(model, prompts):
    rollout = generate_latent(model, *prompts, ending_early(model, prompts), num_generations=4)
    text = rollout.mask & ~rollout.is_latent
    assert (rollout.ids[..., 1:][text] == -100).all()
    assert torch.equal(rollout.ids[..., 0][text], rollout.token[text])
    assert (rollout.ids[rollout.is_latent] >= 0).all()
    # A response is a latent run, then text: no latent step after a text step.
    assert not (rollout.is_latent[:, 1:] & ~rollout.is_latent[:, :-1]).any()
    last = rollout.lengths.unsqueeze(1) - 1
    is_eos = torch.isin(rollout.token.gather(1, last), torch.tensor(EOS))
    assert torch.equal(rollout.finished, (is_eos & ~rollout.is_latent.gather(1, last)).squeeze(1))
    ended = rollout.is_latent[:, :-1] & text[:, 1:]
    first_text = rollout.token[:, 1:][ended]
    assert len(first_text)
    assert first_text.unique().numel() == 1


def test_seeds_change_trajectories_and_repeat(model, prompts):
    options = ending_early(model, prompts)
    first = generate_latent(model, *prompts, options)
    assert torch.equal(first.ids, generate_latent(model, *prompts, options).ids)
    other = generate_latent(model, *prompts, replace(options, seed=6))
    assert not torch.equal(first.scores[:, 0], other.scores[:, 0])


def test_noise_free_decoding_is_the_same_for_every_row_of_a_group(model, prompts):
    options = replace(ending_early(model, prompts), noise="none", temperature=0.0)
    rollout = generate_latent(model, *prompts, options, num_generations=3)
    groups = rollout.ids.view(3, 3, *rollout.ids.shape[1:])
    assert (groups == groups[:, :1]).all()


def test_text_mode_has_no_latent_step_and_needs_no_marker(model, prompts):
    options = LatentSampling(latent=False, max_new_tokens=6, eos_token_id=EOS)
    rollout = generate_latent(model, *prompts, options, num_generations=2)
    assert not rollout.is_latent.any()
    assert (replay_logprob(model, rollout, options.temperature) - rollout.logprob).abs().max() < 1e-4


def test_latent_sampling_without_an_end_marker_is_refused(model, prompts):
    with pytest.raises(ValueError, match="end_token_id"):
        generate_latent(model, *prompts, LatentSampling())


def test_concatenated_rollouts_keep_their_rows(model, prompts):
    ids, mask = prompts
    options = ending_early(model, prompts)
    streams = torch.arange(6).view(3, 2)
    parts = [
        generate_latent(model, ids[i : i + 1], mask[i : i + 1], options, num_generations=2, row_ids=streams[i])
        for i in range(3)
    ]
    joined = concatenate(parts)
    whole = generate_latent(model, ids, mask, options, num_generations=2)
    assert torch.equal(joined.ids[joined.mask], whole.ids[whole.mask])
    torch.testing.assert_close(
        replay_logprob(model, joined, 1.0), replay_logprob(model, whole, 1.0), rtol=1e-4, atol=1e-4
    )


def test_loss_masks_split_a_response(model, prompts):
    rollout = generate_latent(model, *prompts, ending_early(model, prompts), num_generations=4)
    latent, text = response_mask(rollout, "latent"), response_mask(rollout, "text")
    assert not (latent & text).any()
    assert torch.equal(latent | text, response_mask(rollout, "all"))


def test_entropy_of_mixtures_is_between_zero_and_log_k(model, prompts):
    rollout = generate_latent(model, *prompts, ending_early(model, prompts))
    entropy = mixture_entropy(rollout)
    assert (entropy >= 0).all()
    assert (entropy <= torch.log(torch.tensor(4.0)) + 1e-5).all()
    assert (entropy[~rollout.is_latent] == 0).all()


def test_rollouts_of_a_float64_model(prompts):
    double = make_model("llama-tied").double()
    rollout = generate_latent(double, *prompts, ending_early(double, prompts), num_generations=2)
    gap = (replay_logprob(double, rollout, 1.0) - rollout.logprob) * rollout.mask
    assert gap.abs().max() < 1e-5
