"""Soft labels: their file, the released chunks, their noise and their loss."""

from __future__ import annotations

import copy
import json
import math
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from support.trainers import ROWS

from latent_grpo import LatentSFTConfig, LatentSFTTrainer
from latent_grpo.errors import DataError
from latent_grpo.model import Head, embedding_table
from latent_grpo.prompts import PromptFormat
from latent_grpo.quickstart.toy_task import make_model
from latent_grpo.sft import build_examples, collate, target_loss
from latent_grpo.sft import inputs as sft_inputs
from latent_grpo.sft.inputs import perturbed_labels
from latent_grpo.sft.soft_labels import SoftLabels, hashed_prompts, join_rows, read_soft_labels, write_soft_labels
from latent_grpo.watching.names import METRICS

CPU = torch.device("cpu")
RELEASED = json.loads((Path(__file__).parent / "released_sft.json").read_text())["stage2"]
DATA = ROWS[:12]
TOP_K = 4


def label_rows(vocabulary: int = 100, rows: int = len(DATA)) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return random labels of one to three steps per row."""
    generator = torch.Generator().manual_seed(0)

    def row(number: int) -> tuple[torch.Tensor, torch.Tensor]:
        scores = torch.randn(1 + number % 3, vocabulary, generator=generator)
        highest = scores.topk(TOP_K)
        return highest.values.mul(2).softmax(-1), highest.indices

    return [row(number) for number in range(rows)]


@pytest.fixture
def written(tokenizer, tmp_path) -> str:
    """The path of a file with labels of DATA."""
    prompts = hashed_prompts(tokenizer, DATA, PromptFormat())
    labels = replace(join_rows(label_rows(), "test"), compression=2, vocabulary=len(tokenizer), prompts=prompts)
    write_soft_labels(tmp_path / "labels.safetensors", labels)
    return str(tmp_path / "labels.safetensors")


def chunks(folder: Path, rows, bounds=(0, 5, 12), name="batch_{}_{}.pt", dtype=torch.bfloat16) -> str:
    """Write rows as the released code does, in 16 bits."""
    folder.mkdir()
    for start, end in pairwise(bounds):
        torch.save([(probs.to(dtype), ids) for probs, ids in rows[start:end]], folder / name.format(start, end))
    return str(folder)


def make_trainer(tokenizer, folder: Path, **options) -> LatentSFTTrainer:
    base = dict(
        output_dir=str(folder / "run"),
        targets="soft_labels",
        answer_template="{answer}",
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        log_table=False,
        save_steps=0,
    )
    return LatentSFTTrainer(make_model(tokenizer, seed=0), LatentSFTConfig(**{**base, **options}), DATA, tokenizer)


def test_a_file_of_labels_reads_back(written):
    labels, rows = read_soft_labels(written), label_rows()
    assert len(labels) == len(rows)
    assert labels.compression == 2
    for number, (probs, ids) in enumerate(rows):
        read_probs, read_ids = labels.row(number)
        torch.testing.assert_close(read_probs, probs)
        assert torch.equal(read_ids, ids.int())


def test_released_chunks_are_read_in_the_order_of_their_rows(tmp_path):
    rows = label_rows(rows=1200)
    labels = read_soft_labels(chunks(tmp_path / "chunks", rows, bounds=(0, 200, 1000, 1200)))  # 1000 sorts before 200
    assert len(labels) == 1200
    for number in (0, 199, 200, 999, 1000, 1199):
        probs, ids = labels.row(number)
        assert torch.equal(ids, rows[number][1].int())
        torch.testing.assert_close(probs, rows[number][0], rtol=2e-2, atol=1e-3)
        torch.testing.assert_close(probs.sum(-1), torch.ones(len(probs)))


def damage_missing_chunk(folder: Path) -> str:
    path = chunks(folder, label_rows())
    (folder / "batch_0_5.pt").unlink()
    return path


def damage_short_chunk(folder: Path) -> str:
    path = chunks(folder, label_rows())
    torch.save(label_rows()[:3], folder / "batch_0_5.pt")
    return path


def damage_full_vocabulary(folder: Path) -> str:
    folder.mkdir()
    torch.save([torch.rand(2, 9)], folder / "batch_0_1.pt")
    return str(folder)


def damage_code(folder: Path) -> str:
    folder.mkdir()
    torch.save([Path("code")], folder / "batch_0_1.pt")
    return str(folder)


def damage_cut_chunk(folder: Path) -> str:
    path = chunks(folder, label_rows())
    whole = (folder / "batch_5_12.pt").read_bytes()
    (folder / "batch_5_12.pt").write_bytes(whole[: len(whole) // 2])
    return path


def damage_no_step(folder: Path) -> str:
    rows = label_rows()
    rows[3] = (torch.zeros(0, TOP_K), torch.zeros(0, TOP_K).long())
    return chunks(folder, rows)


def damage_sum(folder: Path) -> str:
    return chunks(folder, [(probs * 2, ids) for probs, ids in label_rows()])


def damage_empty_folder(folder: Path) -> str:
    folder.mkdir()
    return str(folder)


def damage_other_file(folder: Path) -> str:
    folder.mkdir()
    (folder / "x.safetensors").write_text("no tensors")
    return str(folder / "x.safetensors")


def damage_width(folder: Path) -> str:
    rows = label_rows()
    rows[4] = tuple(part[:, :3] for part in rows[4])
    return chunks(folder, rows)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_missing_chunk, "starts at row 5, the files before it end at 0; add the missing one"),
        (damage_short_chunk, "holds 3 rows, its name says 5"),
        (damage_full_vocabulary, "no list of (probabilities, ids)"),
        (damage_code, "cannot be read as tensors (it is damaged, or holds other objects, which may run code)"),
        (damage_cut_chunk, "failed finding central directory); write it again"),
        (damage_no_step, "row 4 has no latent step"),
        (damage_sum, "do not sum to 1"),
        (damage_empty_folder, "has no files batch_START_END.pt"),
        (damage_other_file, "no soft labels can be read"),
        (damage_width, "row 5 has probabilities [2, 3] and ids [2, 3], not [steps, 4]"),
        (lambda folder: str(folder / "none"), "no such file of soft labels"),
    ],
)
def test_a_damaged_source_is_one_line(damage, message, tmp_path):
    with pytest.raises(DataError, match=re.escape(message)) as error:
        read_soft_labels(damage(tmp_path / "chunks"))
    assert "\n" not in str(error.value)


def test_labels_of_other_data_or_another_model_are_refused(tokenizer, written, tmp_path):
    def refused(labels: SoftLabels, message: str) -> None:
        write_soft_labels(tmp_path / "other", labels)
        with pytest.raises(DataError, match=re.escape(message)):
            make_trainer(tokenizer, tmp_path, soft_labels=str(tmp_path / "other"))

    labels = read_soft_labels(written)
    refused(join_rows(label_rows(rows=11), "test"), "has labels of 11 rows, the data set has 12")
    refused(replace(labels, prompts="12 prompts, sha256 0"), "was made from other prompts")
    ids = labels.ids.clone()
    ids[3, 1] = len(tokenizer) + 5
    refused(replace(labels, ids=ids), f"has the id {len(tokenizer) + 5}, the model has {len(tokenizer)} tokens")
    ids[3, 1] = -1
    refused(replace(labels, ids=ids), "has the id -1")


@pytest.mark.parametrize("number", range(len(RELEASED)))
def test_noise_and_divergence_are_those_of_the_released_functions(number, monkeypatch, tokenizer):
    """The inputs repeat those with which the numbers were made."""
    case, steps, vocabulary, top_k = RELEASED[number], 1 + number % 4, 13, 4
    grid = torch.arange(steps * vocabulary).double().mul(1.7).add(number)
    logits = 4 * torch.sin(grid).view(steps, vocabulary).float()
    ids = torch.stack([(torch.arange(top_k) * 3 + step + number) % vocabulary for step in range(steps)])
    grid = torch.arange(steps * top_k).double()
    probs = torch.softmax(3 * torch.cos(grid * 2.3 + number).view(steps, top_k), -1).float()
    if number % 3 == 0:
        probs[0, 0] = 0
        probs[0] /= probs[0].sum()
    log_exponential = 2.5 * torch.sin(grid * 3.1 + number).view(steps, top_k).float()

    row = {"prompt": "x", "answer": "1"}
    labels = join_rows([(probs, ids)], "test")
    (example,) = build_examples(tokenizer, [row], LatentSFTConfig(answer_template="{answer}"), None, labels)
    batch = collate([example], CPU)
    start = len(example.prompt)
    noise = torch.zeros(batch.weights.shape)
    noise[0, start : start + steps] = -log_exponential
    monkeypatch.setattr(sft_inputs, "gumbel", lambda *_: noise)
    perturbed, failed = perturbed_labels(batch, case["scale"], 0, 0, end_id=-1)
    assert failed == 0
    noisy = perturbed.weights[0, start : start + steps]
    torch.testing.assert_close(noisy, torch.tensor(case["noisy"]), rtol=1e-5, atol=2e-7)
    assert torch.equal(perturbed.weights[~batch.latent], batch.weights[~batch.latent])
    head = torch.eye(vocabulary)
    for weights, expected in ((probs, case["kl"]), (noisy, case["kl_noisy"])):
        actual = float(target_loss(logits, Head(head), ids, weights)) / steps
        assert actual == pytest.approx(expected, rel=1e-5, abs=2e-6)


def label_batch(tokenizer, rows, first: int = 0, last: int = len(DATA)):
    examples = build_examples(
        tokenizer, DATA, LatentSFTConfig(answer_template="{answer}"), None, join_rows(rows, "test")
    )
    return collate(examples[first:last], CPU)


def heaviest(batch) -> torch.Tensor:
    return batch.ids.gather(-1, batch.weights.argmax(-1, keepdim=True)).squeeze(-1)


def test_a_row_is_drawn_again_while_the_end_marker_is_on_top(tokenizer):
    end, rows = 50, label_rows()
    for number in range(6):  # the end marker is likely in these rows, and the only likely id in the first
        ids = rows[number][1].masked_fill(rows[number][1] == end, end + 1)
        ids[0, 0] = end
        rows[number] = (torch.tensor([0.55, 0.25, 0.15, 0.05]).expand(ids.shape).clone(), ids)
    rows[0] = (torch.tensor([[1.0, 0.0, 0.0, 0.0]]), rows[0][1])
    batch = label_batch(tokenizer, rows)
    once, _ = perturbed_labels(batch, 1.0, seed=3, step=2, end_id=-1)
    drawn, failed = perturbed_labels(batch, 1.0, seed=3, step=2, end_id=end)
    on_top = ((heaviest(once) == end) & batch.latent).any(-1)
    still = ((heaviest(drawn) == end) & batch.latent).any(-1)
    assert failed == 1
    assert still.tolist() == [True] + [False] * (len(DATA) - 1)
    assert 1 < int(on_top.sum()) < 6
    assert torch.equal(drawn.weights[~on_top], once.weights[~on_top])  # these rows keep their first draw
    torch.testing.assert_close(drawn.weights[batch.latent].sum(-1), torch.ones(int(batch.latent.sum())))
    # A row's draws do not depend on the rows around it.
    part, _ = perturbed_labels(label_batch(tokenizer, rows, 4, 7), 1.0, seed=3, step=2, end_id=end)
    chosen = drawn.weights[4:7][drawn.latent[4:7]]
    assert torch.equal(part.weights[part.latent], chosen)
    for seed, step in ((4, 2), (3, 3)):
        other, _ = perturbed_labels(batch, 1.0, seed=seed, step=step, end_id=end)
        assert not torch.equal(other.weights, drawn.weights)


def expected_terms(trainer, indices) -> tuple[float, float]:
    """Return cross-entropy and divergence of some examples without noise, one at a time, in float64."""
    model = copy.deepcopy(trainer.model).double().eval()
    table = embedding_table(model).detach()
    text_losses, divergences = [], []
    for example in (trainer.examples[i] for i in indices):
        probs, ids = (part.double() if part.is_floating_point() else part.long() for part in example.labels)
        text = torch.tensor([token for (token,) in example.response])
        inputs = torch.cat([table[example.prompt], torch.einsum("sk,skd->sd", probs, table[ids]), table[text]])
        logits = model(inputs_embeds=inputs.unsqueeze(0)).logits[0].detach().log_softmax(-1)
        before = len(example.prompt) - 1  # the position that predicts the first latent step
        steps = len(probs)
        at_steps = logits[before : before + steps].gather(-1, ids)
        divergences.append(float((probs * (probs.log() - at_steps)).sum(-1).mean()))
        text_losses += (-logits[before + steps : -1].gather(-1, text.unsqueeze(-1))).flatten().tolist()
    return sum(text_losses) / len(text_losses), sum(divergences) / len(divergences)


@pytest.mark.parametrize("cut", [(4, 2), (8, 1), (2, 4)])
def test_the_loss_of_an_update_is_the_published_one_however_it_is_cut(cut, tokenizer, written, tmp_path):
    size, accumulation = cut
    options = dict(per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, max_steps=1)
    trainer = make_trainer(tokenizer, tmp_path, soft_labels=written, ce_weight=0.5, kl_weight=2.0, **options)
    queue = trainer.next_examples()
    trainer.queue = queue + trainer.queue
    text, divergence = expected_terms(trainer, queue)
    trainer.train()
    values = trainer.metrics.history[0]
    assert values["ce"] == pytest.approx(text, rel=1e-5)
    assert values["kl"] == pytest.approx(divergence, rel=1e-5)
    assert values["loss"] == pytest.approx(0.5 * text + 2.0 * divergence, rel=1e-5)


def test_noise_reaches_targets_and_inputs(tokenizer, written, tmp_path):
    losses = []
    for scale in (0.0, 1.0):
        trainer = make_trainer(tokenizer, tmp_path / str(scale), soft_labels=written, gumbel_scale=scale, max_steps=1)
        losses.append(trainer.train())
    assert abs(losses[0]["kl"] - losses[1]["kl"]) > 1e-3
    assert losses[0]["ce"] != losses[1]["ce"]


def test_a_model_learns_its_labels(tokenizer, written, tmp_path):
    options = dict(max_steps=30, learning_rate=3e-3, per_device_train_batch_size=12)
    trainer = make_trainer(tokenizer, tmp_path, soft_labels=written, **options)
    trainer.train()
    history = trainer.metrics.history
    assert history[-1]["kl"] < 0.5 * history[0]["kl"]
    assert history[-1]["ce"] < 0.5 * history[0]["ce"]
    assert all(math.isfinite(values["loss"]) for values in history)


def test_rows_that_are_drawn_in_vain_are_a_metric_and_one_warning(tokenizer, tmp_path):
    end, rows = tokenizer.convert_tokens_to_ids("</think>"), label_rows()
    for number in (0, 4, 8):
        rows[number] = (torch.tensor([[1.0, 0.0, 0.0, 0.0]]), torch.tensor([[end, 5, 6, 7]]))
    write_soft_labels(tmp_path / "labels", join_rows(rows, "test"))
    options = dict(soft_labels=str(tmp_path / "labels"), gumbel_scale=1.0, per_device_train_batch_size=12, max_steps=2)
    trainer = make_trainer(tokenizer, tmp_path, **options)
    with pytest.warns(UserWarning, match="25% of the rows have the end marker on top") as caught:
        trainer.train()
    assert len([one for one in caught if "end marker" in str(one.message)]) == 1
    assert {name for values in trainer.metrics.history for name in values} - {"step", "phase"} <= METRICS.keys()
    assert [values["latent/end_on_top"] for values in trainer.metrics.history] == [0.25, 0.25]
