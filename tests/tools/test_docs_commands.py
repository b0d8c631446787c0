"""The commands of the documents run, in the order of their page, on a tiny model for a step or two.

The test makes the data and the models that a page uses without making them. It runs each command of the page with
further flags that make it short. ELSEWHERE lists the commands that another test or continuous integration runs.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from support.documents import PAGES, REPOSITORY, blocks, commands_of, program
from support.released import save_checkpoint, write_rl_file

from latent_grpo.quickstart.toy_task import make_model, make_problems, make_tokenizer

# The first words of commands that are run elsewhere, and the file that runs them.
ELSEWHERE = {
    ("pip",): ".ci/run",
    ("ruff",): ".ci/run",
    ("mypy",): ".ci/run",
    ("python", "-m", "pytest"): ".ci/run",
    ("python", "docs/figures.py"): "tests/tools/test_docs.py",
    ("python", "docs/metrics.py"): "tests/trainer/watching/test_names.py",
    ("python", "docs/models.py"): "tests/tools/test_models_page.py",
    ("python", "docs/options.py"): "tests/tools/test_docs.py",
    ("python", "docs/trl.py"): "tests/tools/test_trl_page.py",
    ("python", "-m", "support.damages"): "tests/trainer/saving/test_damages.py",
    ("python", "-m", "support.faults"): "tests/trainer/saving/test_random_faults.py",
    ("python", "-m", "bench", "gpu-report"): "tests/tools/test_gpu_report.py",
    ("python", "-m", "bench.before_after"): "tests/tools/test_before_after.py",
    ("python", "-m", "bench.planner"): "tests/trainer/commands/test_memory_plan.py",
    ("python", "-m", "bench.scaling"): "tests/tools/test_bench_tools.py",
    ("latent-grpo", "probes"): "tests/trainer/study/test_probes.py",
    ("export",): "tests/tools/test_docs_commands.py",  # every test of this file has its threads set
}
MODELS = {"HuggingFaceTB/SmolLM2-135M-Instruct": "tiny", "HuggingFaceTB/SmolLM2-135M": "tiny"}
DATA = {
    "svamp": "svamp=gsm8k_test.jsonl",
    "low-difficulty": "multiarith=gsm8k_test.jsonl",
    "high-difficulty": "math-500=mine_test.jsonl",
}
TRAIN = (
    "--max_steps 1 --save_steps 1 --max_completion_length 8 --max_generation_batches 1 --no_group_filter "
    "--latent_top_k 4 --generation_batch_size 64"
)
SHORT = {
    "quickstart": "",
    "encode": "--max_steps 2 --max_completion_length 16 --read_back_rows 4",
    "sft": "--max_steps 2 --max_completion_length 16",
    "train": TRAIN,
    "eval": "--max_completion_length 8",
    "generate": "--max_completion_length 8",
    "inspect": "",
    "doctor": "",
    "compare": "--sft_steps 3 --grpo_steps 2 --train_problems 80 --held_out_problems 12 --watched_problems 5 "
    "--num_samples 2 --seeds 0 --workers 1 --arms latent-grpo text-grpo",
    "bench": "--shapes tiny --repeats 1 --no-memory",
    "bench.rollout": "--rows 4 --prompt 8 --new 8 --repeats 1",
    "bench.warm_start": "--seeds 0 --problems 400 --held_out 8 --text_steps 2 --encode_steps 2 --sft_steps 2",
}
# Processes on the page, and in the test. A page resumes a run of 8 processes with 4 and doubles the accumulation, which
# keeps the size of an update. The test must halve its number of processes too.
PROCESSES = {"8": "2", "4": "1"}
RECIPES = {"low-difficulty", "high-difficulty"}  # they name models and data of the Hub


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files that pages use without making them: models, problems in three formats, results of benchmarks.

    The formats are the documented one, that of GSM8K, and the released one, which the paper's recipes ask for.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    tokenizer = make_tokenizer()
    make_model(tokenizer, seed=0).save_pretrained("tiny")
    tokenizer.save_pretrained("tiny")
    save_checkpoint(Path("released"), "llama")
    write_rl_file(Path("released.parquet"), "llama", 32)
    keys = json.loads(blocks(REPOSITORY / "docs" / "recipes.md", "json")[0].text)
    for kind, count in (("", 32), ("_test", 4)):
        problems = make_problems(count, seed=count)
        gsm8k = [{"question": row["prompt"], "answer": f"<<{row['chain']}>>\n#### {row['answer']}"} for row in problems]
        files = {f"mine{kind}.jsonl": [{key: row[key] for key in keys} for row in problems]}
        files[f"gsm8k{kind or '_train'}.jsonl"] = gsm8k
        for name, rows in files.items():
            Path(name).write_text("\n".join(map(json.dumps, rows)))
    bench = "python -m bench mix_embeddings --shapes tiny --repeats 3 --no-memory --json"
    main, arguments = program(bench.split())
    Path("report").mkdir()
    assert main([*arguments, "before.json"]) == 0
    # Copies: two measurements may differ by so much that `bench.compare` finds a regression.
    for name in ("after.json", "report/report.json"):
        shutil.copy("before.json", name)
    return tmp_path


def stand_ins(words: Sequence[str]) -> list[str]:
    """Return the words with local models and data in place of those of the page.

    A model folder that no command of the page has made becomes a link to the tiny model.
    """
    words = [MODELS.get(word, word) for word in words]
    if "--data" in words:
        words = [DATA.get(word, word) for word in words]
    for flag, value in pairwise(words):
        if flag in ("--model", "--model_name_or_path") and not Path(value).exists():
            Path(value).parent.mkdir(parents=True, exist_ok=True)
            Path(value).symlink_to(Path("tiny").resolve())
    if "--config" in words and RECIPES & {*words} and "--data" not in words:
        words += ["--model_name_or_path", "released", "--dataset", "released.parquet"]
        words += ["--per_device_train_batch_size", "8"]
    return [word.replace("/shared/", "shared/") for word in words]


def shortened(words: list[str]) -> list[str]:
    """Return the arguments of a command of `latent-grpo` or `bench`, with flags that make it take seconds."""
    arguments = stand_ins(words)
    name = next(word for word in words if word in SHORT or word.startswith("bench."))
    extra = SHORT.get(name, "").split()
    if name == "doctor" and "--plan" in words:
        extra = ["--model_name_or_path", "tiny"] if "--config" in words else []
    if name == "train" and "--resume_from_checkpoint" in words:
        extra[extra.index("--max_steps") + 1] = "2"
    if "--gradient_accumulation_steps" not in words and name == "train":
        extra += ["--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "8"]
    if "--rows" in words and name == "bench":
        extra += ["--rows", "32"]
    return [*arguments, *extra]


def run_ranks(words: list[str]) -> None:
    """Run a command of torchrun with fewer processes, all of them on this machine."""
    at = words.index("-m")
    launcher, inner = words[1:at], words[at:]
    launcher = [PROCESSES.get(word, word) for word in launcher]
    for flag, value in (("--nnodes", "1"), ("--rdzv-endpoint", "localhost:0")):
        if flag in launcher:
            launcher[launcher.index(flag) + 1] = value
    if "--rdzv-endpoint" not in launcher:
        launcher = ["--standalone", *launcher]
    inner = shortened(["python", *inner])[1:]
    if "--per_device_train_batch_size" in words:  # the page's value must come after that of `stand_ins`
        at = words.index("--per_device_train_batch_size")
        inner += words[at : at + 2]
    command = [sys.executable, "-m", "torch.distributed.run", *launcher, *inner]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stderr[-4000:]}"


def run_command(words: list[str]) -> None:
    """Run a command of a page, shortened. Fail unless its exit code is 0."""
    if words[0] == "torchrun":
        return run_ranks(words)
    main, arguments = program(shortened(words))
    gpu_only = words[2:3] == ["bench.routes"] and not torch.cuda.is_available()
    assert main(arguments) == (2 if gpu_only else 0), " ".join(words)
    return None


WITH_COMMANDS = [page for page in PAGES if any(commands_of(page))]


@pytest.mark.slow  # `test_docs.py` lets the parsers of the programs accept every command
@pytest.mark.parametrize("page", WITH_COMMANDS, ids=[page.name for page in WITH_COMMANDS])
def test_the_commands_of_a_page_run(page: Path, folder: Path, short_quickstart: None) -> None:
    threads = torch.get_num_threads()
    number_run = 0
    for words in commands_of(page):
        if not any(tuple(words[: len(start)]) == start for start in ELSEWHERE):
            if len(words) == 2:
                continue  # a sentence names the command
            if words[:2] == ["latent-grpo", "quickstart"] and Path("runs/quickstart").exists():
                continue  # a page shows it twice, and a finished run is not overwritten
            run_command(words)
            number_run += 1
    torch.set_num_threads(threads)
    if page.name == "recipes.md":  # the walk-through leaves the files that the page names
        assert "mine_test.jsonl" in Path("runs/mine/eval.md").read_text()
        assert all(Path("runs", name).exists() for name in ("mine/eval.json", "mine-lora/model.safetensors", "low"))
        assert Path("curves.png").is_file()
    only_names_commands = ("method.md", "metrics.md", "models.md", "options.md", "trl.md")
    assert number_run or page.name in only_names_commands


@pytest.mark.parametrize("file", sorted({*ELSEWHERE.values()}))
def test_the_file_that_runs_a_command_elsewhere_names_it(file: str) -> None:
    text = (REPOSITORY / file).read_text()
    for start, where in ELSEWHERE.items():
        if where == file:
            name = re.split(r"[./]", start[-1])[-1 if not start[-1].startswith("docs/") else 1]
            assert name.replace("-", "_") in text.replace("-", "_"), start
