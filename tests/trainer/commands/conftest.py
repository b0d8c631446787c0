"""The files that commands read in tests: a tiny model, data and configurations, some of them with mistakes."""

from __future__ import annotations

import json

import pytest

from latent_grpo.quickstart.toy_task import make_model, make_problems


@pytest.fixture(scope="session")
def input_folder(tokenizer, tmp_path_factory):
    """A folder with a tiny model, a data file with prompt, chain and answer, and files with one mistake each."""
    folder = tmp_path_factory.mktemp("inputs")
    make_model(tokenizer, seed=0).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    files = {
        "data.jsonl": "\n".join(json.dumps(row) for row in make_problems(24, seed=0)),
        "empty.jsonl": "",
        "broken.jsonl": '{"prompt": "a", "answer": "1"}\n{oops\n',
        "without_chain.jsonl": '{"prompt": "a", "answer": "1"}\n',
        "unknown_key.yaml": "learning_rat: 1e-5\n",
        "unknown_choice.yaml": "scale_rewards: true\n",
        "word_for_list.yaml": "report_to: wandb\n",
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def train_command(input_folder):
    """`train_command(out, *flags)` returns the words of a short `latent-grpo train` that writes to `out`."""

    def words(out, *flags: str) -> list[str]:
        files = f"--model_name_or_path {input_folder}/model --dataset {input_folder}/data.jsonl --output_dir {out}"
        rollouts = "--generation_batch_size 8 --num_generations 4 --max_completion_length 6 --max_generation_batches 1"
        return ["train", *f"{files} {rollouts} --latent_top_k 2 --no_group_filter".split(), *flags]

    return words
