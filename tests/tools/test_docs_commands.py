"""The commands of the documents run, page by page and in the order of the page, on a tiny model and a step or two.

What a page takes for granted (its data, its models) is there; a command is the page's, with flags behind it that make
it short. The few that other tests run, or continuous integration itself, are listed with the file that does.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from support.documents import PAGES, REPOSITORY, blocks, commands_of, program

from latent_grpo.quickstart.toy_task import make_model, make_problems, make_tokenizer

# Commands that are run elsewhere, by how they begin, and the file that runs them.
ELSEWHERE = {
    ("pip",): ".ci/run",
    ("ruff",): ".ci/run",
    ("mypy",): ".ci/run",
    ("python", "-m", "pytest"): ".ci/run",
    ("python", "docs/figures.py"): "tests/tools/test_docs.py",
    ("python", "docs/options.py"): "tests/tools/test_docs.py",
    ("python", "-m", "bench", "gpu-report"): "tests/tools/test_gpu_report.py",
    ("python", "-m", "bench.before_after"): "tests/tools/test_before_after.py",
    ("python", "-m", "bench.planner"): "tests/trainer/commands/test_memory_plan.py",
    ("python", "-m", "bench.scaling"): "tests/tools/test_bench_tools.py",
    ("export",): "tests/tools/test_docs_commands.py",  # every test of this file has its threads set
}
MODELS = {"HuggingFaceTB/SmolLM2-135M-Instruct": "tiny", "HuggingFaceTB/SmolLM2-135M": "tiny"}
DATA = {"svamp": "svamp=gsm8k_test.jsonl", "high-difficulty": "math-500=mine_test.jsonl"}
TRAIN = (
    "--max_steps 1 --save_steps 1 --max_completion_length 8 --max_generation_batches 1 --no_group_filter "
    "--latent_top_k 4 --generation_batch_size 64"
)
SHORT = {
    "quickstart": "",
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
}
PROCESSES = {"8": "2", "4": "1"}  # of the same run: updates stay of one size when it is resumed
PRESETS = {"low-difficulty", "high-difficulty"}  # recipes of models and data that are not here


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What pages take for granted: a model, problems in the documented format and in GSM8K's, results of a bench."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    tokenizer = make_tokenizer()
    make_model(tokenizer, seed=0).save_pretrained("tiny")
    tokenizer.save_pretrained("tiny")
    keys = json.loads(blocks(REPOSITORY / "docs" / "recipes.md", "json")[0].text)
    for kind, count in (("", 32), ("_test", 4)):
        problems = make_problems(count, seed=count)
        gsm8k = [{"question": row["prompt"], "answer": f"<<{row['chain']}>>\n#### {row['answer']}"} for row in problems]
        files = {f"mine{kind}.jsonl": [{key: row[key] for key in keys} for row in problems]}
        files[f"gsm8k{kind or '_train'}.jsonl"] = gsm8k
        for name, rows in files.items():
            Path(name).write_text("\n".join(map(json.dumps, rows)))
    quick = "python -m bench mix_embeddings --shapes tiny --repeats 3 --no-memory --json"
    main, arguments = program(quick.split())
    Path("report").mkdir()
    for name in ("before.json", "after.json", "report/report.json"):
        assert main([*arguments, name]) == 0
    return tmp_path


def stand_ins(words: Sequence[str]) -> list[str]:
    """The words with models and data that are here; a model of a run that the page does not make is the tiny one."""
    found = [MODELS.get(word, word) for word in words]
    if "--data" in found:
        found = [DATA.get(word, word) for word in found]
    for flag, value in pairwise(found):
        if flag in ("--model", "--model_name_or_path") and not Path(value).exists():
            Path(value).parent.mkdir(parents=True, exist_ok=True)
            Path(value).symlink_to(Path("tiny").resolve())
    if "--config" in found and PRESETS & {*found} and "--data" not in found:
        found += ["--model_name_or_path", "tiny", "--dataset", "mine.jsonl", "--per_device_train_batch_size", "8"]
    return [word.replace("/shared/", "shared/") for word in found]


def shortened(words: list[str]) -> list[str]:
    """A command of `latent-grpo` or of `bench` that takes seconds."""
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
    """A command of torchrun, with fewer processes and all of them here."""
    at = words.index("-m")
    launcher, inner = words[1:at], words[at:]
    launcher = [PROCESSES.get(word, word) for word in launcher]
    for flag, value in (("--nnodes", "1"), ("--rdzv-endpoint", "localhost:0")):
        if flag in launcher:
            launcher[launcher.index(flag) + 1] = value
    if "--rdzv-endpoint" not in launcher:
        launcher = ["--standalone", *launcher]
    inner = shortened(["python", *inner])[1:]
    if "--per_device_train_batch_size" in words:  # the page's own, behind that of `stand_ins`
        at = words.index("--per_device_train_batch_size")
        inner += words[at : at + 2]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *launcher, *inner], capture_output=True, text=True, timeout=600,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stderr[-4000:]}"


def run_command(words: list[str]) -> None:
    """Run a command as it stands on the page but for its length; fail unless its exit code is 0."""
    if words[0] == "torchrun":
        return run_ranks(words)
    main, arguments = program(shortened(words))
    gpu_only = words[2:3] == ["bench.routes"] and not torch.cuda.is_available()
    assert main(arguments) == (2 if gpu_only else 0), " ".join(words)
    return None


WITH_COMMANDS = [page for page in PAGES if any(commands_of(page))]


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=[page.name for page in WITH_COMMANDS])
def test_the_commands_of_a_page_run(page: Path, folder: Path, short_quickstart: None) -> None:
    threads = torch.get_num_threads()
    run = []
    for words in commands_of(page):
        if not any(tuple(words[: len(start)]) == start for start in ELSEWHERE):
            if len(words) == 2:
                continue  # the name of a command
            if words[:2] == ["latent-grpo", "quickstart"] and Path("runs/quickstart").exists():
                continue  # twice on a page
            run_command(words)
            run.append(words)
    torch.set_num_threads(threads)
    if page.name == "recipes.md":  # the newcomer's way leaves what the page says
        assert "mine_test.jsonl" in Path("runs/mine/eval.md").read_text()
        assert all(Path("runs", name).exists() for name in ("mine/eval.json", "mine-lora/model.safetensors", "low"))
        assert Path("curves.png").is_file()
    assert run or page.name == "options.md"


@pytest.mark.parametrize("file", sorted({*ELSEWHERE.values()}))
def test_what_runs_elsewhere_is_named_there(file: str) -> None:
    text = (REPOSITORY / file).read_text()
    for start, where in ELSEWHERE.items():
        if where == file:
            name = re.split(r"[./]", start[-1])[-1 if not start[-1].startswith("docs/") else 1]
            assert name.replace("-", "_") in text.replace("-", "_"), start
