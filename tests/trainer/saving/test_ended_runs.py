"""A run that is stopped, poisoned or out of space keeps its good checkpoints, and says what it leaves."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple

import pytest
import torch
from support.killed_runs import ROWS, SFT, metrics_of
from support.small_runs import grpo
from transformers import AutoModelForCausalLM

from latent_grpo import LatentSFTConfig, LatentSFTTrainer
from latent_grpo.errors import ConfigError, ModelError, RewardError, SaveError, TrainingError
from latent_grpo.model import load_model
from latent_grpo.quickstart.toy_task import make_model, make_tokenizer
from latent_grpo.saving import interrupt as interrupt_module
from latent_grpo.saving import model_files
from latent_grpo.saving.integrity import checkpoints_in, read_state
from latent_grpo.saving.interrupt import Stopped
from latent_grpo.saving.model_files import save_model
from latent_grpo.saving.run_folder import only_run_in

NAN = float("nan")


class Reward:
    """Rewards that agree within no group, and what is to happen at a call, counted from 1."""

    def __init__(self, call, action):
        self.call, self.action, self.calls, self.trainer = call, action, 0, None
        self.__name__ = "hooked"

    def __call__(self, completions, **columns):
        self.calls += 1
        if self.calls == self.call:
            self.action(self.trainer)
        return [float(i % 2) for i in range(len(completions))]


def hooked(out, call, action, **options):
    reward = Reward(call, action)
    reward.trainer = grpo(out, reward=reward, **{"max_steps": 6, **options})
    return reward.trainer


def names(run):
    return [path.name for path in checkpoints_in(run)]


def poison_optimizer(trainer):
    trainer.updater.optimizer.state[trainer.updater.masters[0]]["exp_avg"].view(-1)[0] = NAN


def poison_gradients(trainer):
    trainer.updater.parameters[0].register_hook(lambda gradient: gradient * NAN)


def test_a_poisoned_optimizer_stops_the_run_and_leaves_the_good_checkpoint(tmp_path):
    trainer = hooked(tmp_path / "run", 3, poison_optimizer, save_total_limit=1)
    with pytest.raises(TrainingError, match=r"after step 3, .* holds NaN .*checkpoint-2': resume it") as error:
        trainer.train()
    assert "\n" not in str(error.value)
    assert names(tmp_path / "run") == ["checkpoint-2"]
    assert read_state(tmp_path / "run" / "checkpoint-2")["step"] == 2
    assert not list((tmp_path / "run").glob("*.safetensors"))


def test_a_few_skipped_updates_in_a_row_stop_the_run_with_the_cause(tmp_path):
    trainer = hooked(tmp_path / "run", 2, poison_gradients, max_skipped_updates=2)
    match = r"2 updates in a row were skipped, .* \(first in 'model.*'\); .*checkpoint-2': resume it, or raise"
    with pytest.warns(UserWarning, match="update skipped"), pytest.raises(TrainingError, match=match):
        trainer.train()
    assert trainer.step == 3
    assert names(tmp_path / "run") == ["checkpoint-1", "checkpoint-2"]


def test_skipped_updates_before_a_good_one_of_the_same_step_count(tmp_path, monkeypatch):
    trainer = hooked(tmp_path / "run", 0, None, max_skipped_updates=2, num_iterations=3)
    norms, real = iter([1.0] * 3 + [NAN, NAN, 1.0]), torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *given: real(*given) * next(norms))
    with pytest.warns(UserWarning, match="update skipped"), pytest.raises(TrainingError, match="2 updates in a row"):
        trainer.train()
    assert names(tmp_path / "run") == ["checkpoint-1"]


def test_skipped_updates_that_are_not_in_a_row_do_not_stop_the_run(tmp_path, monkeypatch):
    trainer = hooked(tmp_path / "run", 0, None, max_skipped_updates=2, max_steps=4)
    norms, real = iter([1.0, NAN, 1.0, NAN]), torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *given: real(*given) * next(norms))
    with pytest.warns(UserWarning, match="update skipped"):
        trainer.train()
    assert (trainer.step, trainer.updater.skipped) == (4, 2)


def test_no_model_with_nan_is_saved_or_loaded(tmp_path):
    model, tokenizer = make_model(make_tokenizer(), seed=0), make_tokenizer()
    prompt_format = grpo(tmp_path / "run").prompt_format
    save_model(tmp_path / "good", model, tokenizer, prompt_format)
    name, weight = list(model.named_parameters())[3]
    with torch.no_grad():
        weight.view(-1)[-1] = NAN
    with pytest.raises(TrainingError, match=f"'{name}' holds NaN"):
        save_model(tmp_path / "bad", model, tokenizer, prompt_format)
    assert not (tmp_path / "bad" / "model.safetensors").exists()
    model.save_pretrained(tmp_path / "bad")
    tokenizer.save_pretrained(tmp_path / "bad")
    with pytest.raises(ModelError, match=f"the weight '{name}' of '.*bad' is not finite"):
        load_model(str(tmp_path / "bad"))
    with pytest.raises(ModelError, match=f"the weight '{name}'"):
        grpo(tmp_path / "run", model=model)


def test_a_checkpoint_with_nan_in_the_optimizer_is_not_resumed(tmp_path, monkeypatch):
    trainer = grpo(tmp_path / "run")
    trainer.train()
    poison_optimizer(trainer)
    monkeypatch.setattr(trainer.checkpoints, "check_finite", lambda step: None)  # as in a version that did not look
    trainer.save()
    match = r"checkpoint-2' cannot be used: '.*' holds NaN or infinity; choose an older one"
    with pytest.raises(ConfigError, match=match) as error:
        grpo(tmp_path / "run").train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("learning_rate", 1e3), ("weight_decay", 1e9), ("max_hours", 0), ("max_hours", NAN), ("beta", 1e300)],
)
def test_absurd_values_are_refused(name, value, tmp_path):
    with pytest.raises(ConfigError, match=f"{name} is "):
        grpo(tmp_path / "run", **{name: value})


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_finishes_the_step_and_saves(name, tmp_path, capfd, request):
    number = getattr(signal, name)
    # Under nohup the tests ignore SIGHUP, and so would the run.
    inherited = signal.signal(number, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(number, inherited))
    trainer = hooked(tmp_path / "run", 2, lambda _: os.kill(os.getpid(), number), save_steps=0)
    before = signal.getsignal(number)
    kind = KeyboardInterrupt if name == "SIGINT" else Stopped
    with pytest.raises(kind, match=f"{name}: stopped after step 2, saved .*checkpoint-2; .* auto") as stop:
        trainer.train()
    assert type(stop.value) is kind
    assert f"{name}: finishing this step, then saving" in capfd.readouterr().err
    assert names(tmp_path / "run") == ["checkpoint-2"]
    assert signal.getsignal(number) == before


def test_a_second_ctrl_c_saves_the_last_finished_step(tmp_path, monkeypatch):
    monkeypatch.setattr(interrupt_module, "ONE_KEYSTROKE", 0.0)

    def press_twice(_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the second one has no effect")

    trainer = hooked(tmp_path / "run", 3, press_twice, save_steps=0)
    with pytest.warns(UserWarning, match="checkpoint-2' holds the last finished"), pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert names(tmp_path / "run") == ["checkpoint-2"]
    # It goes on as if the run had not been stopped.
    hooked(tmp_path / "run", 0, None, save_steps=0).train(resume_from_checkpoint="auto")
    hooked(tmp_path / "whole", 0, None, save_steps=0).train()
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "whole")


def test_a_failing_reward_leaves_the_last_finished_step(tmp_path):
    def fail(_):
        raise OSError("the judge is down")

    trainer = hooked(tmp_path / "run", 3, fail, save_steps=0)
    with pytest.warns(UserWarning, match="checkpoint-2' holds the last"), pytest.raises(RewardError, match="judge is"):
        trainer.train()
    assert names(tmp_path / "run") == ["checkpoint-2"]


def test_the_clock_stops_a_run_in_time(tmp_path):
    limit = 1.5
    trainer = hooked(tmp_path / "run", 0, None, max_steps=10**6, save_steps=0, max_hours=limit / 3600)
    started = time.monotonic()
    with pytest.raises(Stopped, match=r"max_hours is .*: stopped after step"):
        trainer.train()
    assert time.monotonic() - started < 4 * limit  # of a machine that others use too
    assert names(tmp_path / "run") == [f"checkpoint-{trainer.step}"]


def test_a_folder_has_one_run_at_a_time(tmp_path):
    run = tmp_path / "run"
    with only_run_in(run), pytest.raises(ConfigError, match="is in use: another run is writing there"):
        grpo(run).train()
    tokenizer = make_tokenizer()
    warm_start = LatentSFTConfig(**{**SFT, "output_dir": str(run)})
    with only_run_in(run), pytest.raises(ConfigError, match="is in use: another run is writing there"):
        LatentSFTTrainer(make_model(tokenizer, seed=0), warm_start, ROWS, tokenizer).train()
    # The kernel releases the lock of a process that is killed.
    code = (
        "import sys, time; from latent_grpo.saving.run_folder import only_run_in; from pathlib import Path\n"
        "with only_run_in(Path(sys.argv[1])): print('locked', flush=True); time.sleep(600)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(run)], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "locked\n"
    with pytest.raises(ConfigError, match="is in use"):
        grpo(run).train()
    other.kill()
    other.communicate()
    grpo(run).train()
    assert names(run) == ["checkpoint-1", "checkpoint-2"]


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize("failure", ["stop", "continue"])
def test_a_checkpoint_that_does_not_fit_is_not_begun(failure, tmp_path, monkeypatch):
    run = tmp_path / "run"
    trainer = hooked(run, 2, lambda _: monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(9, 9, 9)), max_steps=3)
    trainer.args.save_failure = failure
    match = "it needs .* MiB and 0 MiB are free; the last good checkpoint is '.*checkpoint-1'"
    if failure == "stop":
        with pytest.raises(SaveError, match=match):
            trainer.train()
    else:
        with pytest.warns(UserWarning, match=match):
            trainer.train()
        assert (run / "model.safetensors").exists()
    assert names(run) == ["checkpoint-1"]
    assert not list(run.glob(".*"))


@pytest.fixture
def small_files():
    """`small_files()` lets no file grow beyond 100 kB, as a full disk or a quota does, until the test ends."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_metrics_that_cannot_be_written_are_named(tmp_path, monkeypatch):
    class Full:
        name = "metrics.jsonl"

        def write(self, line):
            raise OSError(28, "No space left on device")

    trainer = hooked(tmp_path / "run", 2, lambda trainer: monkeypatch.setattr(trainer.metrics, "file", Full()))
    with pytest.raises(SaveError, match=r"metrics of step 2 could not be written to 'metrics.jsonl' \(No space left"):
        trainer.train()
    assert names(tmp_path / "run") == ["checkpoint-1"]


@pytest.mark.parametrize("file", ["optimizer", "tensors"])
def test_a_half_written_checkpoint_is_removed_at_once(file, tmp_path, monkeypatch, small_files):
    run = tmp_path / "run"

    def full(*_):
        raise OSError(28, "No space left on device")

    def fill(_):
        small_files() if file == "optimizer" else monkeypatch.setattr(torch, "save", full)

    trainer = hooked(run, 2, fill)
    cause = "File too large" if file == "optimizer" else "No space left"
    with pytest.raises(SaveError, match=rf"checkpoint-2' could not be written .*{cause}.*checkpoint-1'") as error:
        trainer.train()
    assert "\n" not in str(error.value)
    assert names(run) == ["checkpoint-1"]
    assert not list(run.glob(".*"))


@pytest.mark.parametrize("sharded", [False, True])
def test_a_reader_sees_the_old_or_the_new_model(sharded, tmp_path, monkeypatch):
    tokenizer, folder = make_tokenizer(), tmp_path / "model"
    old, new = make_model(tokenizer, seed=0), make_model(tokenizer, seed=1)
    prompt_format = grpo(tmp_path / "run").prompt_format
    for model in (old, new) if sharded else ():
        whole = model.save_pretrained
        monkeypatch.setattr(model, "save_pretrained", lambda path, whole=whole: whole(path, max_shard_size="40KB"))
    save_model(folder, old, tokenizer, prompt_format)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == sharded
    seen, replace = [], os.replace

    def check_after(source, target):
        replace(source, target)
        read = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        same = [all(torch.equal(read[k], v) for k, v in model.state_dict().items()) for model in (old, new)]
        assert sum(same) == 1
        seen.append(same.index(True))

    monkeypatch.setattr(model_files.os, "replace", check_after)
    save_model(folder, new, tokenizer, prompt_format)
    assert seen == sorted(seen)
    assert set(seen) == {0, 1}
    if sharded:
        assert {p.name for p in folder.glob("model-*")} == model_files.shards_of(folder / model_files.INDEX)


def test_signals_outside_the_main_thread_keep_their_effect(tmp_path):
    outcome = []
    thread = threading.Thread(target=lambda: outcome.append(grpo(tmp_path / "run").train()))
    thread.start()
    thread.join()
    assert "reward" in outcome[0]
