"""The first stage of Latent-SFT: its module, its phases, its labels, and how it resumes."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from support.trainers import ROWS

from latent_grpo.config import EncodeConfig
from latent_grpo.errors import ConfigError, DataError
from latent_grpo.model import embedding_table, lm_head, load_model
from latent_grpo.prompts import PromptFormat
from latent_grpo.quickstart.toy_task import make_model
from latent_grpo.sft import encode as encode_module
from latent_grpo.sft.chain_model import ChainModel
from latent_grpo.sft.encode import LABEL_FILE, encode
from latent_grpo.sft.pieces import chain_batch, chain_example
from latent_grpo.sft.soft_labels import read_soft_labels
from latent_grpo.watching.names import METRICS

CPU = torch.device("cpu")
RELEASED = json.loads((Path(__file__).parent / "released_sft.json").read_text())["latents"]
DATA = [{**row, "chain": " ".join([row["chain"], row["chain"], row["answer"]])} for row in ROWS[:24]]


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory) -> str:
    """The folder of an untrained model."""
    folder = str(tmp_path_factory.mktemp("base"))
    make_model(tokenizer, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def options(base: str, folder: Path, **given) -> EncodeConfig:
    common = dict(
        model_name_or_path=base,
        output_dir=str(folder),
        answer_template="{answer}",
        max_steps=2,
        learning_rate=1e-3,
        per_device_train_batch_size=8,
        read_back_rows=4,
        read_back_steps=1,
        label_size=3,
        save_steps=0,
        log_table=False,
    )
    return EncodeConfig(**{**common, **given})


def chain_model(tokenizer, trained=("encoder", "decoder"), tied=True, **given) -> ChainModel:
    encoder, decoder = make_model(tokenizer, seed=0, tied=tied), make_model(tokenizer, seed=1, tied=tied)
    return ChainModel(encoder, decoder, None, trained, options("", Path("unused"), **given))


def batch_of(tokenizer, rows, **given):
    args = options("", Path("unused"), **given)
    marker = tokenizer("</think>")["input_ids"]
    examples = [chain_example(tokenizer, row, 1, args, PromptFormat(), marker) for row in rows]
    return examples, chain_batch(examples, CPU)


def test_a_soft_label_is_the_softmax_of_the_highest_products_with_the_table(tokenizer, monkeypatch):
    """The inputs repeat those with which the released function's numbers were made."""
    table = torch.sin(torch.arange(17 * 6).double() * 0.9).view(17, 6).float()
    states = 3 * torch.cos(torch.arange(5 * 6).double() * 1.3).view(5, 6).float()
    model = chain_model(tokenizer, label_size=4)
    _, batch = batch_of(tokenizer, DATA[:1])
    batch.cut[:] = False
    batch.cut[0, :5] = True
    placed = torch.zeros(*batch.cut.shape, 6).masked_scatter(batch.cut.unsqueeze(-1), states)
    monkeypatch.setattr("latent_grpo.sft.chain_model.body", lambda *_: placed)
    monkeypatch.setattr(
        "latent_grpo.sft.chain_model.embedding_table",
        lambda part: embedding_table(part) if part is model.encoder else table,
    )
    probs, ids = model.soft_labels(batch)
    assert ids.tolist() == RELEASED["ids"]
    torch.testing.assert_close(probs, torch.tensor(RELEASED["probs"]), rtol=1e-4, atol=2e-6)
    mixtures = (probs.unsqueeze(-1) * table[ids]).sum(1)
    torch.testing.assert_close(mixtures, torch.tensor(RELEASED["mixture"]), rtol=1e-4, atol=2e-6)


def test_a_piece_reads_its_latent_step_alone_and_the_answer_reads_no_piece(tokenizer):
    model = chain_model(tokenizer)
    (example,), batch = batch_of(tokenizer, DATA[:1])
    changed = copy.deepcopy(batch)
    first = batch.piece[0].nonzero()[0]  # a token of the second piece, which L_1 carries
    changed.decoder_ids[0, first] = (batch.decoder_ids[0, first] + 7) % 50
    states = torch.zeros(2, batch.target.shape[1], 128)
    for row, one in enumerate((batch, changed)):
        states[row, 1:][one.target[0, 1:]] = model.decoded(one).detach()
    differs = (states[0] - states[1]).abs().amax(-1) > 1e-6
    # A target's state is that of the position before it. Only the token behind the changed one is predicted from it.
    assert differs.nonzero().flatten().tolist() == [int(first) + 1]
    assert len(example.pieces) > 2


@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_is_the_cross_entropy_of_chain_tokens_and_text(tied, tokenizer):
    model = chain_model(tokenizer, tied=tied).double()
    examples, batch = batch_of(tokenizer, DATA[:3])
    loss = model.loss(batch)
    expected, right = 0.0, 0
    for example in examples:  # each alone, without padding
        alone = chain_batch([example], CPU)
        probs, ids = model.soft_labels(alone)
        table = embedding_table(model.decoder)
        embeds = table[alone.decoder_ids]
        embeds[alone.latent] = torch.einsum("nk,nkd->nd", probs.double(), table[ids].double())
        mask = torch.zeros(alone.decoder_mask.shape).double().masked_fill(~alone.decoder_mask, -torch.inf)
        out = model.decoder(inputs_embeds=embeds, attention_mask=mask, position_ids=alone.decoder_positions)
        target = alone.target[0, 1:]
        logits, tokens = out.logits[0, :-1][target], alone.decoder_ids[0, 1:][target]
        expected = expected + F.cross_entropy(logits, tokens, reduction="sum")
        right += int((logits.argmax(-1) == tokens).sum())
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    loss.backward()
    table, token = embedding_table(model.encoder), model.compress_token
    assert token.grad.abs().sum() > 0
    assert table.grad is not None
    assert lm_head(model.encoder).requires_grad == tied
    assert int(model.right(batch).sum()) == right


def test_a_phase_trains_its_parts_and_no_other(tokenizer, base, tmp_path):
    args = options(base, tmp_path / "run")
    encode(args, DATA, tokenizer)
    start = dict(load_model(base).named_parameters())
    for phase, parts in {"encoder": ["encoder"], "decoder": ["decoder"], "union": ["decoder", "encoder"]}.items():
        folder = tmp_path / "run" / phase
        assert sorted(path.parent.name for path in folder.glob("*/model.safetensors")) == parts
        for part in parts:
            trained = dict(load_model(str(folder / part)).named_parameters())
            assert all(not torch.equal(value, start[name]) for name, value in trained.items()), (phase, part)
        history = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
        assert [line["phase"] for line in history] == [phase] * 2
        assert {name for line in history for name in line} - {"step", "phase"} <= METRICS.keys()
        assert all(0 <= line[share] <= 1 for line in history for share in ("latent/read_back", "latent/read_answers"))
    tokens = [
        load_file(tmp_path / "run" / p / "encoder" / "compress_token.safetensors")["compress_token"]
        for p in ("encoder", "union")
    ]
    assert not torch.equal(tokens[0], start["model.embed_tokens.weight"].mean(0))
    assert not torch.equal(*tokens)


def test_the_labels_of_every_row_are_those_of_the_union_phase(tokenizer, base, tmp_path):
    args = options(base, tmp_path / "run", per_device_train_batch_size=5, phases=["encoder", "decoder", "union"])
    encode(args, DATA, tokenizer)
    encode(options(base, tmp_path / "run", phases=["labels"]), DATA, tokenizer)
    labels = read_soft_labels(str(tmp_path / "run" / LABEL_FILE))
    assert (len(labels), labels.compression, labels.vocabulary) == (len(DATA), 2, len(tokenizer))
    union = tmp_path / "run" / "union"
    encoder, decoder = (load_model(str(union / part)) for part in ("encoder", "decoder"))
    token = load_file(union / "encoder" / "compress_token.safetensors")["compress_token"]
    table = embedding_table(encoder)
    for number, row in enumerate(DATA):
        chain = tokenizer(row["chain"], add_special_tokens=False)["input_ids"]
        inputs = [table[tokenizer(row["prompt"])["input_ids"]]]
        places = list(range(len(inputs[0])))
        probs, ids = labels.row(number)
        assert len(probs) == -(-len(chain) // 2)
        for step, start in enumerate(range(0, len(chain), 2)):
            # One step at a time: earlier compress tokens are left out, but keep their places.
            piece, place = chain[start : start + 2], len(inputs[0]) + 3 * step
            inputs.append(table[piece])
            places += range(place, place + len(piece))
            embeds = torch.cat([*inputs, token.unsqueeze(0)]).unsqueeze(0)
            position_ids = torch.tensor([[*places, place + len(piece)]])
            state = encoder.base_model(inputs_embeds=embeds, position_ids=position_ids).last_hidden_state[0, -1]
            highest = (embedding_table(decoder) @ state).topk(3)
            torch.testing.assert_close(probs[step], highest.values.softmax(-1), rtol=1e-4, atol=1e-5)
            assert ids[step].tolist() == highest.indices.tolist()


def test_adapters_are_merged_and_new_in_every_phase(tokenizer, base, tmp_path):
    pytest.importorskip("peft")
    args = options(
        base, tmp_path / "run", use_peft=True, lora_r=4, lora_target_modules=["q_proj", "v_proj"], lora_dropout=0.1
    )
    encode(args, DATA, tokenizer)
    start = dict(load_model(base).named_parameters())
    for phase, part in (("encoder", "encoder"), ("decoder", "decoder"), ("union", "encoder")):
        trained = dict(load_model(str(tmp_path / "run" / phase / part)).named_parameters())
        assert trained.keys() == start.keys()
        changed = {name for name, value in trained.items() if not torch.equal(value, start[name])}
        assert changed == {name for name in start if "q_proj" in name or "v_proj" in name}
    assert (tmp_path / "run" / LABEL_FILE).exists()


def test_an_interrupted_phase_resumes_and_finished_ones_are_kept(tokenizer, base, tmp_path, monkeypatch):
    def shares(folder: Path) -> list[float]:
        return [json.loads(line)["loss"] for line in (folder / "union" / "metrics.jsonl").open()]

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    given = dict(max_steps=4, save_steps=2)
    encode(options(base, whole, **given), DATA, tokenizer)
    update = encode_module.Phase.update

    def interrupted(self, indices):
        if self.phase == "union" and self.step == 3:
            raise KeyboardInterrupt
        return update(self, indices)

    monkeypatch.setattr(encode_module.Phase, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encode(options(base, broken, **given), DATA, tokenizer)
    monkeypatch.undo()
    finished = (broken / "encoder" / "metrics.jsonl").read_text()
    encode(options(base, broken, **given, resume_from_checkpoint="true"), DATA, tokenizer)
    assert (broken / "encoder" / "metrics.jsonl").read_text() == finished
    assert shares(broken) == shares(whole)
    labels = [load_file(folder / LABEL_FILE) for folder in (broken, whole)]
    assert all(torch.equal(labels[0][name], labels[1][name]) for name in ("probs", "ids", "offsets"))
    written = (broken / LABEL_FILE).stat().st_mtime_ns
    with pytest.raises(ConfigError, match=r"learning_rate is 1.0: encoder has finished with 0.001; give that"):
        encode(options(base, broken, learning_rate=1.0, resume_from_checkpoint="true"), DATA, tokenizer)
    for refused in ({"label_size": 2}, {"resume_from_checkpoint": None}):
        again = options(base, broken, **{**given, "resume_from_checkpoint": "true", "phases": ["labels"], **refused})
        with pytest.raises(ConfigError, match=f"{LABEL_FILE} .*move it away, or leave labels out of --phases"):
            encode(again, DATA, tokenizer)
    assert encode(options(base, broken, **given, resume_from_checkpoint="true"), DATA, tokenizer) == {}
    assert (broken / LABEL_FILE).stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(phases=["labels"]), "labels needs .*union' finished; add union"),
        (dict(phases=["decoder"]), "decoder needs .*encoder' finished; add encoder"),
        (dict(phases=["encode"]), "phases is 'encode': choose from encoder, decoder, union, labels"),
        (dict(phases=[]), "phases is .*: choose from"),
        (dict(read_back_rows=24), "read_back_rows is 24: 24 rows fit"),
        (dict(label_size=1000), "label_size is 1000: the vocabulary has"),
        (dict(resume_from_checkpoint="checkpoint-1"), "resume_from_checkpoint is 'checkpoint-1': give true"),
    ],
    ids=str,
)
def test_what_cannot_be_run_is_one_line(given, message, tokenizer, base, tmp_path):
    with pytest.raises(ConfigError, match=message) as error:
        encode(options(base, tmp_path / "run", **given), DATA, tokenizer)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("chain", [None, "", " "])
def test_a_row_without_a_chain_is_named(chain, tokenizer, base, tmp_path):
    rows = [*DATA, {**DATA[0], "chain": chain}]
    with pytest.raises(DataError, match=f"row {len(rows)}"):
        encode(options(base, tmp_path / "run", phases=["encoder"]), rows, tokenizer)


def test_a_phase_learns(tokenizer, base, tmp_path):
    args = options(base, tmp_path / "run", max_steps=12, learning_rate=3e-3, read_back_steps=12)
    args.phases = ["encoder", "decoder"]
    results = encode(args, DATA, tokenizer)
    first = json.loads((tmp_path / "run" / "decoder" / "metrics.jsonl").open().readline())
    assert results["decoder"]["loss"] < 0.7 * first["loss"]
