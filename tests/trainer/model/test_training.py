"""Training of models whose heads and tables are not plain: as objects and from folders, of both trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import tiny
from support.trainers import ROWS, even, grpo

from latent_grpo import LatentGRPOTrainer, LatentSFTConfig, LatentSFTTrainer
from latent_grpo.config import EncodeConfig
from latent_grpo.model import embed, load_model
from latent_grpo.sft import build_examples, collate
from latent_grpo.sft.chain_model import ChainModel
from latent_grpo.sft.loss import batch_loss
from latent_grpo.update.statistics import GAP

KINDS = ("gemma2", "gemma3_text", "cohere", "granite", "phi", "gptj")


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_trains_alike_as_an_object_and_from_its_folder(kind: str, tokenizer: Any, tmp_path: Path) -> None:
    model = tiny(kind, len(tokenizer))
    model.save_pretrained(tmp_path / "model")
    options = dict(latent_top_k=4, max_steps=2, invalid="keep", rows=ROWS[:8])
    as_object = grpo(tmp_path / "object", tokenizer, even, model, **options)
    args = as_object.args.__class__(**{**vars(as_object.args), "output_dir": str(tmp_path / "out")})
    from_folder = LatentGRPOTrainer(str(tmp_path / "model"), even, args, ROWS[:8], None, tokenizer)
    values, others = as_object.train(), from_folder.train()
    assert values[GAP] < 1e-4
    assert values["loss"] == pytest.approx(others["loss"], abs=1e-6)
    pairs = zip(as_object.model.parameters(), from_folder.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert any(not torch.equal(a, b) for a, b in zip(as_object.model.parameters(), model.parameters(), strict=True))
    load_model(str(tmp_path / "out"))  # what was trained is accepted again


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_a_warm_start_is_that_of_the_models_own_forward(kind: str, tokenizer: Any, tmp_path: Path) -> None:
    model = tiny(kind, len(tokenizer))
    args = LatentSFTConfig(output_dir=str(tmp_path), compression=2, answer_template="{answer}", max_steps=1)
    batch = collate(build_examples(tokenizer, ROWS[:3], args), torch.device("cpu"))
    actual = batch_loss(model, batch, args, 0)
    expected = torch.zeros((), dtype=torch.float64)
    for row in range(len(batch.ids)):
        kept = batch.mask[row].bool()
        ids, weights, response = batch.ids[row][kept], batch.weights[row][kept], batch.response[row][kept]
        fed = (weights.unsqueeze(-1) * model.get_input_embeddings()(ids)).sum(1)
        own = model(inputs_embeds=fed.unsqueeze(0)).logits[0, :-1].double().log_softmax(-1)
        for place in response[1:].nonzero().squeeze(-1).tolist():
            for token in ids[place + 1].unique().tolist():
                weight = weights[place + 1][ids[place + 1] == token].sum().double()
                expected += weight * (weight.clamp_min(1e-30).log() - own[place, token])
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    LatentSFTTrainer(model, args, ROWS[:8], tokenizer).train()
    load_model(str(tmp_path))


@pytest.mark.parametrize("kind", ["gemma3_text", "cohere", "phi"])
def test_soft_labels_are_scaled_and_capped_as_the_models_logits_are(kind: str, tokenizer: Any) -> None:
    encoder, decoder = tiny(kind, len(tokenizer)), tiny(kind, len(tokenizer))
    model = ChainModel(encoder, decoder, None, (), EncodeConfig(label_size=4))
    every = embed(encoder, torch.arange(len(tokenizer)))
    torch.testing.assert_close(model.compress_token, every.mean(0))
    ids = torch.tensor([[5, 6, 7]])
    batch = type("Batch", (), {})()
    batch.encoder_ids, batch.cut = ids, torch.tensor([[False, False, True]])
    batch.encoder_mask = torch.ones(3, 3).tril().bool().view(1, 1, 3, 3)
    probs, top = model.soft_labels(batch)
    fed = torch.cat([embed(encoder, ids[:, :2]), model.compress_token.view(1, 1, -1)], 1)
    state = encoder.base_model(inputs_embeds=fed).last_hidden_state[:, -1]
    logits = state @ decoder.get_input_embeddings().weight.T
    scale, cap = {"gemma3_text": (1.0, 4.0), "cohere": (0.25, None), "phi": (1.0, None)}[kind]
    logits = scale * logits if cap is None else cap * torch.tanh(scale * logits / cap)
    expected = logits.topk(4)
    assert torch.equal(top, expected.indices)
    torch.testing.assert_close(probs, expected.values.softmax(-1))
