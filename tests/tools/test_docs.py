"""Tests of the pages: links resolve, Python snippets run on tiny inputs, programs accept the options of commands.

`test_docs_commands.py` runs the commands.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shlex
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from support.documents import FENCE, PAGES, REPOSITORY, blocks, commands_of, program, script
from torch.distributed.run import get_args_parser as torchrun_arguments

from latent_grpo.commands import main as cli
from latent_grpo.config import LatentGRPOConfig
from latent_grpo.quickstart.toy_task import make_model, make_problems, make_tokenizer
from latent_kernels import fused_policy_loss, latent_step, policy_loss

LINK = re.compile(r"\]\(([^)\s]+)\)")
# Only the extras that their commands name are checked.
OTHER_PROGRAMS = {"ruff", "mypy", "pip", "export"}


def ids_of(pages: list[Path]) -> list[str]:
    """Return the names of pages, as ids of tests."""
    return [page.relative_to(REPOSITORY).as_posix() for page in pages]


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=ids_of(PAGES))
def test_relative_links_resolve(page: Path) -> None:
    for target in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(linked), f"{page.name} links to {target}"


def test_every_page_is_reached_from_the_readme() -> None:
    reached, unread = set(), [REPOSITORY / "README.md"]
    while unread:
        page = unread.pop()
        reached.add(page)
        targets = [target.partition("#")[0] for target in LINK.findall(page.read_text(encoding="utf-8"))]
        linked = [(page.parent / target).resolve() for target in targets if target.endswith(".md")]
        unread += [path for path in linked if path not in reached]
    assert set(PAGES) <= reached


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    """Model and tokenizer of the quickstart's toy task."""
    tokenizer = make_tokenizer()
    return make_model(tokenizer, seed=0), tokenizer


def operator_inputs() -> dict[str, Any]:
    """Return the tensors that the README's snippets of operators use without making them."""
    rows, steps, top_k, vocab, width = 3, 4, 5, 50, 8
    return {
        "torch": torch,
        "hidden": torch.randn(rows, steps, width, requires_grad=True),
        "lm_head": torch.randn(vocab, width),
        "embedding": torch.randn(vocab, width),
        "ids": torch.randint(vocab, (rows, steps, top_k)),
        "scores": torch.randn(rows, steps, top_k),
        "old_logprob": torch.randn(rows, steps),
        "advantages": torch.randn(rows, steps),
        "mask": torch.ones(rows, steps, dtype=torch.bool),
        "state": torch.randn(rows, width),
        "row_ids": torch.arange(rows),
        "t": 2,
        "end": 7,
    }


def names_before(page: str, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Return the names that a page's snippets use without making them."""
    rows = make_problems(16, seed=0)
    encoded = tokenizer([row["prompt"] for row in rows[:2]], return_tensors="pt", padding=True)
    names = {
        "model": model,
        "tokenizer": tokenizer,
        "rows": rows,
        "reward_funcs": "accuracy",
        "end": 3,
        "prompts": encoded["input_ids"],
        "mask": encoded["attention_mask"],
        "reward": lambda rollout: rollout.finished.float(),
    }
    return {**names, **operator_inputs()} if page == "README.md" else names


@pytest.fixture
def stand_ins_for_trl_and_verl(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for the names of TRL and verl that snippets import. Neither package is a dependency."""
    trl = types.ModuleType("trl")
    trl.GRPOTrainer = type("GRPOTrainer", (), {})
    monkeypatch.setitem(sys.modules, "trl", trl)
    for name in ("verl", "verl.trainer", "verl.trainer.ppo", "verl.trainer.ppo.core_algos"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    algorithms = sys.modules["verl.trainer.ppo.core_algos"]
    algorithms.register_policy_loss = algorithms.register_adv_est = lambda name: lambda function: function


@pytest.fixture
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers take one small step, whatever options the snippet gives."""
    check = LatentGRPOConfig.__post_init__

    def shrink(self: LatentGRPOConfig) -> None:
        self.max_steps, self.max_completion_length, self.max_generation_batches = 1, 8, 1
        self.generation_batch_size = 2 * self.num_generations
        check(self)

    monkeypatch.setattr(LatentGRPOConfig, "__post_init__", shrink)


def run_page(page: Path, tiny: tuple[Any, Any]) -> dict[str, Any]:
    """Run the Python blocks of a page in order, each with the names of the blocks before it. Return the names."""
    names = names_before(page.relative_to(REPOSITORY).as_posix(), *tiny)
    for block in blocks(page, "python"):
        exec(compile(block.text, block.page, "exec"), names)
    return names


SNIPPETS = [page for page in PAGES if blocks(page, "python")]


@pytest.mark.parametrize("page", SNIPPETS, ids=ids_of(SNIPPETS))
def test_python_snippets_run(
    page: Path,
    tiny: tuple[Any, Any],
    stand_ins_for_trl_and_verl: None,
    short_runs: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    run_page(page, tiny)


def test_the_latent_step_in_plain_pytorch_in_the_readme_equals_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain snippet draws noise in sorted order, the operator by token. The test gives both the same draws."""
    names = operator_inputs()
    plain, with_operator = blocks(REPOSITORY / "README.md", "python")[:2]
    assert "latent_step(" in with_operator.text
    draws = torch.empty(len(names["state"]), len(names["lm_head"])).exponential_()
    order = (names["state"] @ names["lm_head"].T).sort(-1, descending=True).indices
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda tensor: draws.gather(-1, order))
    exec(plain.text, names)
    monkeypatch.undo()
    step = latent_step(names["state"], names["lm_head"], names["embedding"], top_k=10, exponential=draws)
    torch.testing.assert_close(step.embedding, names["next_input"], rtol=1e-4, atol=1e-5)


def test_the_loss_in_plain_pytorch_in_the_readme_equals_the_operator() -> None:
    names = operator_inputs()
    plain, with_operator = blocks(REPOSITORY / "README.md", "python")[2:4]
    assert "log_softmax" in plain.text
    assert "fused_policy_loss" in with_operator.text
    exec(plain.text, names)
    expected, expected_gradient = names["loss"].detach(), names["hidden"].grad.clone()
    options = dict(temperature=0.6, margin_gradient="none", dual_clip=None)
    names["hidden"].grad = None
    arguments = ("hidden", "lm_head", "ids", "scores", "old_logprob", "advantages", "mask")
    loss, _ = fused_policy_loss(*(names[name] for name in arguments), **options)
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(names["hidden"].grad, expected_gradient, rtol=1e-3, atol=1e-5)


def trainer_for_trl(tiny: tuple[Any, Any], autocast: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Return the trainer of the page around a model, with what TRL gives it; its inputs; and the names of the page."""
    names = run_page(REPOSITORY / "docs" / "your-own-trainer.md", tiny)
    trainer = names["FusedGRPOTrainer"]()
    trainer.accelerator = types.SimpleNamespace(unwrap_model=lambda wrapped: wrapped, autocast=autocast)
    trainer.model, trainer.args = make_model(tiny[1], seed=1).train(), types.SimpleNamespace(delta=3.0)
    trainer.temperature, trainer.epsilon_low, trainer.epsilon_high = 0.7, 0.2, 0.3
    trainer.current_gradient_accumulation_steps, trainer._metrics = 2, {"train": {"clip_ratio/region_mean": []}}
    prompt, token = torch.randint(4, 100, (3, 5)), torch.randint(4, 100, (3, 4))
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
    inputs = {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": token,
        "completion_mask": mask,
        "advantages": torch.tensor([1.0, -1.0, 0.5]),
    }
    return trainer, inputs, names


def test_the_loss_for_trl_equals_the_policy_loss_of_its_logits(
    tiny: tuple[Any, Any], stand_ins_for_trl_and_verl: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in takes the place of TRL.

    With TRL 1.16 itself, the parameters after two updates at a learning rate of 1e-3 differ by 2e-5.
    """
    monkeypatch.chdir(tmp_path)
    trainer, inputs, _ = trainer_for_trl(tiny, contextlib.nullcontext)
    model, prompt, token, mask = (
        trainer.model,
        *(inputs[n] for n in ("prompt_ids", "completion_ids", "completion_mask")),
    )
    logits = model(torch.cat([prompt, token], 1)).logits[:, prompt.shape[1] - 1 : -1] / 0.7
    logprob = logits.log_softmax(-1).gather(-1, token.unsqueeze(-1)).squeeze(-1)
    shift = 0.5 * torch.randn(logprob.shape)
    for old in (None, (logprob + shift).detach()):
        inputs["old_per_token_logps"] = old
        model.zero_grad()
        loss = trainer._compute_loss(model, inputs)
        loss.backward()
        gradient = model.model.norm.weight.grad.clone()
        model.zero_grad()
        advantages = inputs["advantages"].unsqueeze(-1).expand(token.shape)
        expected, _ = policy_loss(
            logprob,
            logprob.detach() if old is None else old,
            advantages,
            mask,
            clip_low=0.2,
            clip_high=0.3,
            dual_clip=3.0,
            aggregation="seq-mean-token-mean",
        )
        (expected / 2).backward(retain_graph=True)
        torch.testing.assert_close(loss, expected / 2, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(gradient, model.model.norm.weight.grad, rtol=1e-3, atol=1e-6)


def test_the_loss_for_trl_runs_the_model_in_bfloat16_if_trl_does(
    tiny: tuple[Any, Any], stand_ins_for_trl_and_verl: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    seen: list[torch.dtype] = []
    losses = []
    for autocast in (contextlib.nullcontext, lambda: torch.autocast("cpu", torch.bfloat16)):
        trainer, inputs, names = trainer_for_trl(tiny, autocast)

        def record(hidden: Any, weight: Any, *rest: Any, **options: Any) -> Any:
            seen.extend((hidden.dtype, weight.dtype))
            return fused_policy_loss(hidden, weight, *rest, **options)

        names["fused_policy_loss"] = record
        layer = trainer.model.model.layers[0].mlp.down_proj
        layer.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
        torch.manual_seed(0)
        inputs["prompt_ids"].random_(4, 100)
        inputs["completion_ids"].random_(4, 100)
        inputs["old_per_token_logps"] = -5.0 * torch.ones(3, 4)
        losses.append(trainer._compute_loss(trainer.model, inputs))
    assert seen == [torch.float32] * 3 + [torch.bfloat16] * 3
    torch.testing.assert_close(losses[1], losses[0], rtol=0.1, atol=0.05)
    losses[1].backward()
    assert trainer.model.model.norm.weight.grad.dtype == torch.float32


def test_the_functions_for_verl_give_advantages_and_loss_in_its_form(
    tiny: tuple[Any, Any], stand_ins_for_trl_and_verl: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_page(REPOSITORY / "docs" / "your-own-trainer.md", tiny)

    class Config(dict):
        clip_ratio, clip_ratio_low, clip_ratio_high = 0.2, None, 0.3

    old, mask = torch.randn(4, 3), torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]])
    logprob = (old + torch.randn(4, 3)).requires_grad_()
    scores = torch.zeros(4, 3)
    scores[[0, 3], -1] = 1.0  # verl keeps the reward of a response at one of its tokens
    advantages, returns = names["latent_grpo_advantages"](scores, mask, index=["a", "a", "b", "b"])
    size = 0.5**0.5  # half a reward over the deviation of two rewards, 0 and 1
    expected = torch.tensor([size, -size, -size, size]).unsqueeze(-1) * mask
    torch.testing.assert_close(advantages, expected, rtol=1e-4, atol=1e-4)
    assert returns is advantages
    loss, metrics = names["fused_policy_loss_of_verl"](old, logprob, advantages, mask, "token-mean", Config())
    torch.testing.assert_close(loss, policy_loss(logprob, old, advantages, mask, clip_high=0.3)[0])
    assert set(metrics) == {"actor/pg_clipfrac", "actor/ppo_kl"}


class Parsed(Exception):  # noqa: N818
    """A program's parser has accepted the command line."""


def check_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail for a command that cannot be run as the page shows it: unknown program, option or extra, missing file."""
    if words[0] == "torchrun":
        launch = torchrun_arguments().parse_args(words[1:])
        assert launch.module, words
        words = ["python", "-m", launch.training_script, *launch.training_script_args]
    original = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, *arguments: Any, **options: Any) -> Any:
        parsed = original(self, *arguments, **options)
        if self.prog == "latent-grpo":  # this parser takes only the name of the command
            return parsed
        raise Parsed

    files = [word for word in words if word.endswith(".py") and not word.startswith("-")]
    if words[:3] == ["python", "-m", "pytest"] or (words[0] == "python" and words[1] != "-m"):
        assert all((REPOSITORY / file).is_file() for file in files), words
        return
    if words[0] in OTHER_PROGRAMS:
        extras = set(re.findall(r"\[(\w+)\]", " ".join(words)))
        project = (REPOSITORY / "pyproject.toml").read_text()
        known = project[project.index("[project.optional-dependencies]") :].partition("\n\n")[0]
        assert extras <= set(re.findall(r"^(\w+) = ", known, re.MULTILINE)), words
        return
    assert words[0] == "latent-grpo" or words[:2] == ["python", "-m"], f"what is {words[0]}?"
    main, arguments = program(words)
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        with pytest.raises(Parsed):
            main(arguments)


@pytest.mark.parametrize("page", PAGES, ids=ids_of(PAGES))
def test_programs_accept_the_commands(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    for words in commands_of(page):
        check_command(words, monkeypatch)
    checked = {block.language for kind in ("", "bash", "python", "json", "bibtex") for block in blocks(page, kind)}
    assert checked == {language for language, _ in FENCE.findall(text)}, "a block in a language that nothing checks"


@pytest.mark.parametrize(
    "words",
    [
        "latent-grpo train --learning_rat 1",
        "python -m bench --sizes tiny",
        "ls",
        "torchrun --nproc-per-node 2 -m latent_grpo train --learning_rat 1",
        "torchrun --processes 2 -m latent_grpo train",
    ],
)
def test_check_command_refuses_a_wrong_command(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((SystemExit, AssertionError)):
        check_command(shlex.split(words), monkeypatch)


def test_usage_names_every_command_and_no_other() -> None:
    (usage,) = (block.text for block in blocks(REPOSITORY / "docs" / "recipes.md", "") if "latent-grpo" in block.text)
    assert re.findall(r"^latent-grpo (\w+)", usage, re.MULTILINE) == list(cli.COMMANDS)


def test_the_page_of_options_is_current(tmp_path: Path) -> None:
    written = tmp_path / "options.md"
    generator = script("options")
    generator.main([str(written)])
    current = (REPOSITORY / "docs" / "options.md").read_text()
    assert current == written.read_text(), f"run `{generator.COMMAND}`"


def test_every_option_is_documented_once() -> None:
    from dataclasses import fields

    page = script("options").page()
    configurations = page[: page.index("## Flags of the other commands")]
    # `sft` has its own default of these options, or another configuration has an option of the same name.
    twice = {"learning_rate", "latent", "freeze_embeddings", "output_dir", "seed"}
    for option in fields(LatentGRPOConfig):
        assert configurations.count(f"| `{option.name}` |") == (2 if option.name in twice else 1), option.name
        assert option.metadata["help"].strip(), option.name
    assert "`exclude`, `zero`, `keep`" in configurations


def test_the_figures_of_the_pages_are_current(tmp_path: Path) -> None:
    generator = script("figures")
    generator.main([str(tmp_path)])
    pages = ("README.md", "docs/method.md")
    shown = {name for page in pages for name in re.findall(r"figures/([\w.-]+)", (REPOSITORY / page).read_text())}
    assert shown == set(generator.FIGURES) == {path.name for path in tmp_path.iterdir()}
    for name in shown:
        pattern = re.compile(r"<text[^>]*>([^<]*)</text>")
        drawn, committed = (
            {word for text in pattern.findall((folder / name).read_text()) for word in text.split()}
            for folder in (tmp_path, REPOSITORY / "docs" / "figures")
        )
        assert "Drawn" in drawn, name
        assert drawn == committed, f"{name}: run `python docs/figures.py`"
