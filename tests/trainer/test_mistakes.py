"""Mistakes in Python. Each is answered in one line that names the value and the remedy, as on the command line.

Those of the command line are in `commands/test_cli.py`.
"""

from __future__ import annotations

import pytest
from support.trainers import ROWS

from latent_grpo import (
    LatentGRPOConfig,
    LatentGRPOTrainer,
    LatentSampling,
    LatentSFTConfig,
    LatentSFTTrainer,
    RunPage,
    load_rows,
)
from latent_grpo.errors import ConfigError, DataError, ModelError, RewardError
from latent_grpo.quickstart.toy_task import make_model

SMALL = dict(generation_batch_size=8, num_generations=4, latent_top_k=2, max_completion_length=4, log_table=False)


class Stream:
    """What a streaming data set of the library datasets has."""

    def __iter__(self):
        return iter(ROWS)

    def take(self, count):
        return ROWS[:count]


def unknown_column(completions, solution, **columns):
    return [0.0] * len(completions)


def too_few(completions, **columns):
    return [0.0]


def words(completions, **columns):
    return ["good"] * len(completions)


OPTIONS = {  # options of LatentGRPOConfig, what the line names
    "a typing mistake": (dict(learning_rat=1e-5), "'learning_rat'; did you mean 'learning_rate'?"),
    "a name of transformers": (dict(bf16=True), "'bf16', a name of TRL: "),
    "a name of generate": (dict(max_new_tokens=5), "'max_new_tokens'; give max_completion_length"),
    "an option of TRL": (dict(use_vllm=True), "'use_vllm', a name of TRL"),
    "a word for a number": (dict(learning_rate="fast"), "learning_rate is 'fast': give a number"),
    "a negative rate": (dict(learning_rate=-1.0), "learning_rate is -1.0: give a number"),
    "a word for a truth value": (dict(latent="yes"), "latent is 'yes': give true or false"),
    "a group of one": (dict(num_generations=1), "num_generations is 1"),
    "a part of a group": (dict(generation_batch_size=9), "generation_batch_size is 9"),
    "an unknown loss": (dict(loss_type="ppo"), "loss_type is 'ppo': choose from "),
    "a word for a list": (dict(report_to="wandb"), "report_to is 'wandb': give a list"),
    "an unknown tracker": (
        dict(report_to=["mlflow"]),
        "report_to is 'mlflow': choose from tensorboard, wandb, trackio",
    ),
    "no temperature": (dict(tau=0.0), "tau is 0.0"),
    "one component": (dict(latent_top_k=1), "latent_top_k is 1"),
    "half a step": (dict(max_completion_length=1.5), "max_completion_length is 1.5: give a whole number"),
    "nothing": (dict(beta=None), "beta is None: give a value"),
    "words for weights": (dict(reward_weights=["a"]), "reward_weights is ['a']: give a list of numbers"),
    "two ways to begin": (dict(overwrite=True, resume_from_checkpoint="true"), "overwrite is True"),
}
TRAINERS = {  # what differs from a trainer that works, what the line names
    "no model": (dict(model="./none"), "'./none' does not exist; give a folder or a Hub name"),
    "a path for rows": (dict(rows="mine.jsonl"), "as latent_grpo.load_rows('mine.jsonl')"),
    "no rows": (dict(rows=[]), "train_dataset is empty; give rows"),
    "all splits": (dict(rows={"train": ROWS}), "keys 'train'; give one split of it"),
    "a stream": (
        dict(rows=Stream()),
        "is a Stream; give a list of rows (dicts), or a datasets.Dataset: rows are drawn",
    ),
    "rows of words": (dict(rows=["a", "b"]), "give a mapping with the key 'prompt'"),
    "columns of no known format": (dict(rows=[{"x": "a", "y": "b"}]), "name the fields with --prompt_column"),
    "a column that is not there": (dict(rows=ROWS[:2], prompt_column="quest"), "no field 'quest'"),
    "a number for a prompt": (dict(rows=[{"prompt": 3, "answer": "1"}]), "prompt 3; give a text"),
    "no answer": (dict(rows=[{"prompt": "a", "answer": None}]), "row 1 has the answer None"),
    "a reward that does not exist": (dict(reward="acuracy"), "acuracy"),
    "a reward without its column": (dict(reward=unknown_column), "needs 'solution', which is no column of the data"),
    "too many weights": (dict(reward_weights=[1.0, 2.0]), "reward_weights"),
    "more components than tokens": (dict(latent_top_k=5000), "latent_top_k is 5000: the vocabulary has"),
    "evaluations without rows": (dict(eval_steps=1), "eval_steps is 1: it needs an eval_dataset"),
    "no such device": (dict(model="{inputs}", device="cuda:7"), "device is 'cuda:7'"),
}


def one_line(error) -> str:
    (line,) = str(error.value).splitlines()
    return line


@pytest.mark.parametrize(("options", "expected"), OPTIONS.values(), ids=OPTIONS)
def test_an_option(options, expected):
    with pytest.raises(ConfigError) as error:
        LatentGRPOConfig(**options)
    assert expected in one_line(error)


@pytest.fixture(scope="module")
def model(tokenizer, tmp_path_factory):
    made = make_model(tokenizer, seed=0)
    folder = tmp_path_factory.mktemp("model")
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return made, str(folder)


def trainer(own, tokenizer, out, *, rows=ROWS, reward="accuracy", **options):
    given = options.pop("model", own[0])
    given = own[1] if given == "{inputs}" else given
    args = LatentGRPOConfig(output_dir=str(out), **{**SMALL, **options})
    return LatentGRPOTrainer(given, reward, args, rows, None, tokenizer)


@pytest.mark.parametrize(("change", "expected"), TRAINERS.values(), ids=TRAINERS)
def test_a_trainer(change, expected, model, tokenizer, tmp_path):
    with pytest.raises((ConfigError, DataError, ModelError)) as error:
        trainer(model, tokenizer, tmp_path / "run", **change)
    assert expected in one_line(error)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (dict(reward=too_few), "too_few"),
        (dict(reward=words), "'good'"),
        (dict(resume_from_checkpoint="true"), "no checkpoint to resume from in"),
    ],
    ids=["too few rewards", "words for rewards", "nothing to resume"],
)
def test_a_run(change, expected, model, tokenizer, tmp_path):
    with pytest.raises((ConfigError, RewardError)) as error:
        trainer(model, tokenizer, tmp_path / "run", **change).train()
    assert expected in one_line(error)


def test_other_classes_and_functions(model, tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="'compresion'; did you mean 'compression'") as error:
        LatentSFTConfig(compresion=2)
    assert one_line(error)
    with pytest.raises(ConfigError, match="'top_kk'; did you mean 'top_k'"):
        LatentSampling(top_kk=1)
    with pytest.raises(ConfigError, match="none' is not a run"):
        RunPage(tmp_path / "none")
    with pytest.raises(DataError, match=r"none\.jsonl: no such file; check the path"):
        load_rows(str(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match="train_dataset is empty"):
        LatentSFTTrainer(model[0], LatentSFTConfig(output_dir=str(tmp_path)), [], tokenizer)


def test_rows_in_python_go_through_the_column_options(model, tokenizer, tmp_path):
    renamed = [{"frage": row["prompt"], "loesung": row["answer"], "level": 3} for row in ROWS]
    columns = dict(prompt_column="frage", answer_column="loesung")
    own = trainer(model, tokenizer, tmp_path / "run", rows=renamed, **columns)
    assert [(row["prompt"], row["answer"], row["level"]) for row in own.rows] == [
        (row["prompt"], row["answer"], 3) for row in ROWS
    ]
    known = [{"question": row["prompt"], "answer": row["answer"]} for row in ROWS]  # the format of GSM8K
    assert trainer(model, tokenizer, tmp_path / "other", rows=known).rows[0]["prompt"] == ROWS[0]["prompt"]
