"""The short run of a real model, with the tiny model: what it leaves, and what it says if the time was too short."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest

from bench import before_after
from latent_grpo.quickstart.toy_task import make_model, make_problems, make_tokenizer


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    tokenizer = make_tokenizer()
    make_model(tokenizer, seed=0).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for name, count in (("train", 60), ("test", 8)):
        lines = (json.dumps(problem) for problem in make_problems(count, seed=count))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    command = (
        f"--model {tmp_path}/model --train {tmp_path}/train.jsonl --test gsm8k={tmp_path}/test.jsonl "
        f"--out {tmp_path}/out --device cpu --dtype float32 --latent_top_k 2 --limit 6 --max_completion_length 12"
    )
    return command.split()


class Impatient(subprocess.Popen):  # type: ignore[type-arg]
    """A process whose time is up when the warm start has logged its third step."""

    def wait(self, timeout: float | None = None) -> int:
        assert isinstance(self.args, list)
        if "sft" not in self.args or timeout == before_after.STOPPING:
            return super().wait(timeout)
        metrics = Path(self.args[self.args.index("--output_dir") + 1]) / "metrics.jsonl"
        while self.poll() is None:
            time.sleep(0.05)
            if metrics.exists() and metrics.read_text().count("\n") >= 3:
                raise subprocess.TimeoutExpired(self.args, 0.0)
        return super().wait()


@pytest.mark.slow
def test_training_that_does_not_end_is_stopped_and_evaluated(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(subprocess, "Popen", Impatient)
    more = ["--sft", "--max_steps 100000 --learning_rate 3e-3", "--grpo", "--max_steps 2 --generation_batch_size 16"]
    assert before_after.main([*arguments, "--minutes", "1000", *more]) == 0
    record = json.loads((tmp_path / "out" / "before-after.json").read_text())
    assert 3 <= record["steps"]["sft"] < 100000
    assert record["steps"]["grpo"] == 2
    for part in ("before", "after"):
        assert record[part]["gsm8k-aug"]["problems"] == 6
        assert 0 <= record[part]["gsm8k-aug"]["pass_at_1"] <= 1
    assert [command.split()[1] for command in record["commands"]] == ["sft", "eval", "train", "eval"]
    assert f"--model {tmp_path / 'out' / 'sft' / 'checkpoint-'}{record['steps']['sft']}" in record["commands"][1]
    assert "| gsm8k-aug | 6 |" in (tmp_path / "out" / "before-after.md").read_text()


def test_a_slot_that_is_too_short_or_a_folder_in_use_is_an_error(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        before_after.main([*arguments, "--minutes", "0"])
    assert stop.value.code == 2
    assert before_after.main([*arguments, "--sft", "--learning_rate -1"]) == 1
    assert "sft ended with exit code 2" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        before_after.main(arguments)
    assert "is not empty" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    with pytest.raises(before_after.SlotError, match="give more --minutes"):
        before_after.trained(tmp_path / "empty")
