"""The documents hold: links resolve, snippets run on tiny inputs, the programs' own parsers take the commands.

That the commands run as well is the subject of `test_docs_commands.py`.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from support.documents import FENCE, PAGES, REPOSITORY, blocks, commands_of, program
from torch.distributed.run import get_args_parser as torchrun_arguments

from latent_grpo.commands import main as cli
from latent_grpo.config import LatentGRPOConfig
from latent_grpo.quickstart.toy_task import make_model, make_problems, make_tokenizer
from latent_kernels import fused_policy_loss, latent_step, policy_loss

LINK = re.compile(r"\]\(([^)\s]+)\)")
OTHER_PROGRAMS = {"ruff", "mypy", "pip", "export"}  # of which only the files and extras that they name are looked at


def ids_of(pages: list[Path]) -> list[str]:
    return [page.relative_to(REPOSITORY).as_posix() for page in pages]


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=ids_of(PAGES))
def test_relative_links_resolve(page: Path) -> None:
    for target in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(found), f"{page.name} links to {target}"


def test_every_page_is_reached_from_the_readme() -> None:
    reached, left = set(), [REPOSITORY / "README.md"]
    while left:
        page = left.pop()
        reached.add(page)
        targets = [target.partition("#")[0] for target in LINK.findall(page.read_text(encoding="utf-8"))]
        linked = [(page.parent / target).resolve() for target in targets if target.endswith(".md")]
        left += [path for path in linked if path not in reached]
    assert set(PAGES) <= reached


# Python


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    """Model and tokenizer of the quickstart's world."""
    tokenizer = make_tokenizer()
    return make_model(tokenizer, seed=0), tokenizer


def steps_of_a_policy() -> dict[str, Any]:
    """What the README's snippets of operators take for granted."""
    rows, steps, top_k, vocab, width = 3, 4, 5, 50, 8
    return {
        "torch": torch, "hidden": torch.randn(rows, steps, width, requires_grad=True),
        "lm_head": torch.randn(vocab, width), "embedding": torch.randn(vocab, width),
        "ids": torch.randint(vocab, (rows, steps, top_k)), "scores": torch.randn(rows, steps, top_k),
        "old_logprob": torch.randn(rows, steps), "advantages": torch.randn(rows, steps),
        "mask": torch.ones(rows, steps, dtype=torch.bool), "state": torch.randn(rows, width),
        "row_ids": torch.arange(rows), "t": 2, "end": 7,
    }  # fmt: skip


def given(page: str, model: Any, tokenizer: Any) -> dict[str, Any]:
    """The names that a page's snippets take for granted."""
    rows = make_problems(16, seed=0)
    encoded = tokenizer([row["prompt"] for row in rows[:2]], return_tensors="pt", padding=True)
    world = {
        "model": model, "tokenizer": tokenizer, "rows": rows, "reward_funcs": "accuracy", "end": 3,
        "prompts": encoded["input_ids"], "mask": encoded["attention_mask"],
        "reward": lambda rollout: rollout.finished.float(),
    }  # fmt: skip
    return {**world, **steps_of_a_policy()} if page == "README.md" else world


@pytest.fixture
def without_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for what the snippets import of TRL and verl, where these are not installed."""
    trl = types.ModuleType("trl")
    trl.GRPOTrainer = type("GRPOTrainer", (), {})
    monkeypatch.setitem(sys.modules, "trl", trl)
    for name in ("verl", "verl.trainer", "verl.trainer.ppo", "verl.trainer.ppo.core_algos"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    algorithms = sys.modules["verl.trainer.ppo.core_algos"]
    algorithms.register_policy_loss = algorithms.register_adv_est = lambda name: lambda function: function


@pytest.fixture
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers take one small step, whatever the snippet says."""
    check = LatentGRPOConfig.__post_init__

    def shrink(self: LatentGRPOConfig) -> None:
        self.max_steps, self.max_completion_length, self.max_generation_batches = 1, 8, 1
        self.generation_batch_size = 2 * self.num_generations
        check(self)

    monkeypatch.setattr(LatentGRPOConfig, "__post_init__", shrink)


def run_page(page: Path, tiny: tuple[Any, Any]) -> dict[str, Any]:
    """Run the page's Python blocks one after the other, each seeing the names of those before."""
    names = given(page.relative_to(REPOSITORY).as_posix(), *tiny)
    for block in blocks(page, "python"):
        exec(compile(block.text, block.page, "exec"), names)
    return names


SNIPPETS = [page for page in PAGES if blocks(page, "python")]


@pytest.mark.parametrize("page", SNIPPETS, ids=ids_of(SNIPPETS))
def test_python_snippets_run(
    page: Path,
    tiny: tuple[Any, Any],
    without_peers: None,
    short_runs: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    run_page(page, tiny)


def test_the_latent_step_in_the_readme_is_the_fused_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's noise is drawn in sorted order and ours by token, so the draws are put in the right places."""
    names = steps_of_a_policy()
    plain, fused = blocks(REPOSITORY / "README.md", "python")[:2]
    assert "latent_step(" in fused.text
    draws = torch.empty(len(names["state"]), len(names["lm_head"])).exponential_()
    order = (names["state"] @ names["lm_head"].T).sort(-1, descending=True).indices
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda tensor: draws.gather(-1, order))
    exec(plain.text, names)
    monkeypatch.undo()
    step = latent_step(names["state"], names["lm_head"], names["embedding"], top_k=10, exponential=draws)
    torch.testing.assert_close(step.embedding, names["next_input"], rtol=1e-4, atol=1e-5)


def test_the_loss_in_the_readme_is_the_fused_one() -> None:
    names = steps_of_a_policy()
    plain, fused = blocks(REPOSITORY / "README.md", "python")[2:4]
    assert "log_softmax" in plain.text
    assert "fused_policy_loss" in fused.text
    exec(plain.text, names)
    by_hand, gradient = names["loss"].detach(), names["hidden"].grad.clone()
    call = dict(temperature=0.6, margin_gradient="none", dual_clip=None)
    names["hidden"].grad = None
    order = ("hidden", "lm_head", "ids", "scores", "old_logprob", "advantages", "mask")
    loss, _ = fused_policy_loss(*(names[name] for name in order), **call)
    loss.backward()
    torch.testing.assert_close(loss.detach(), by_hand, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(names["hidden"].grad, gradient, rtol=1e-3, atol=1e-5)


def test_the_loss_for_trl_is_that_of_its_logits(
    tiny: tuple[Any, Any], without_peers: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With TRL 1.16 itself the parameters after two updates differ by 2e-5, at a rate of 1e-3."""
    monkeypatch.chdir(tmp_path)
    names = run_page(REPOSITORY / "docs" / "your-own-trainer.md", tiny)
    model = make_model(tiny[1], seed=1)
    trainer = names["FusedGRPOTrainer"]()
    trainer.accelerator = types.SimpleNamespace(unwrap_model=lambda wrapped: wrapped)
    trainer.model, trainer.args = model.train(), types.SimpleNamespace(delta=3.0)
    trainer.temperature, trainer.epsilon_low, trainer.epsilon_high = 0.7, 0.2, 0.3
    trainer.current_gradient_accumulation_steps, trainer._metrics = 2, {"train": {"clip_ratio/region_mean": []}}
    prompt, token = torch.randint(4, 100, (3, 5)), torch.randint(4, 100, (3, 4))
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
    inputs = {
        "prompt_ids": prompt, "prompt_mask": torch.ones_like(prompt), "completion_ids": token, "completion_mask": mask,
        "advantages": torch.tensor([1.0, -1.0, 0.5]),
    }  # fmt: skip
    logits = model(torch.cat([prompt, token], 1)).logits[:, prompt.shape[1] - 1 : -1] / 0.7
    logprob = logits.log_softmax(-1).gather(-1, token.unsqueeze(-1)).squeeze(-1)
    shift = 0.5 * torch.randn(logprob.shape)
    for old in (None, (logprob + shift).detach()):
        inputs["old_per_token_logps"] = old
        model.zero_grad()
        loss = trainer._compute_loss(model, inputs)
        loss.backward()
        found = model.model.norm.weight.grad.clone()
        model.zero_grad()
        advantages = inputs["advantages"].unsqueeze(-1).expand(token.shape)
        expected, _ = policy_loss(
            logprob, logprob.detach() if old is None else old, advantages, mask, clip_low=0.2, clip_high=0.3,
            dual_clip=3.0, aggregation="seq-mean-token-mean",
        )  # fmt: skip
        (expected / 2).backward(retain_graph=True)
        torch.testing.assert_close(loss, expected / 2, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found, model.model.norm.weight.grad, rtol=1e-3, atol=1e-6)


def test_the_functions_for_verl_do_what_verl_asks(
    tiny: tuple[Any, Any], without_peers: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_page(REPOSITORY / "docs" / "your-own-trainer.md", tiny)

    class Config(dict):
        clip_ratio, clip_ratio_low, clip_ratio_high = 0.2, None, 0.3

    old, mask = torch.randn(4, 3), torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]])
    logprob = (old + torch.randn(4, 3)).requires_grad_()
    scores = torch.zeros(4, 3)
    scores[[0, 3], -1] = 1.0  # rewards stand at a token
    advantages, returns = names["latent_grpo_advantages"](scores, mask, index=["a", "a", "b", "b"])
    half = 0.5**0.5
    expected = torch.tensor([half, -half, -half, half]).unsqueeze(-1) * mask
    torch.testing.assert_close(advantages, expected, rtol=1e-4, atol=1e-4)
    assert returns is advantages
    loss, metrics = names["fused_policy_loss_of_verl"](old, logprob, advantages, mask, "token-mean", Config())
    torch.testing.assert_close(loss, policy_loss(logprob, old, advantages, mask, clip_high=0.3)[0])
    assert set(metrics) == {"actor/pg_clipfrac", "actor/ppo_kl"}


# Commands


class Parsed(Exception):  # noqa: N818
    """A program's parser has taken the command line."""


def check_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail for a command that cannot be run as it stands: an unknown program or option, a file that is not there."""
    if words[0] == "torchrun":
        launched = torchrun_arguments().parse_args(words[1:])
        assert launched.module, words
        words = ["python", "-m", launched.training_script, *launched.training_script_args]
    take = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, *arguments: Any, **options: Any) -> Any:
        found = take(self, *arguments, **options)
        if self.prog == "latent-grpo":  # that was the name of the command alone
            return found
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
def test_commands_are_ones_that_the_programs_take(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    for words in commands_of(page):
        check_command(words, monkeypatch)
    known = {block.language for kind in ("", "bash", "python", "json", "bibtex") for block in blocks(page, kind)}
    assert known == {language for language, _ in FENCE.findall(text)}, "a block in a language that nothing checks"


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
def test_a_wrong_command_is_found(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((SystemExit, AssertionError)):
        check_command(shlex.split(words), monkeypatch)


def test_usage_names_every_command_and_no_other() -> None:
    (usage,) = (block.text for block in blocks(REPOSITORY / "docs" / "recipes.md", "") if "latent-grpo" in block.text)
    assert re.findall(r"^latent-grpo (\w+)", usage, re.MULTILINE) == list(cli.COMMANDS)


# Generated parts


def docs_script(name: str) -> Any:
    """The module of a script in docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", REPOSITORY / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_the_page_of_options_is_current(tmp_path: Path) -> None:
    written = tmp_path / "options.md"
    script = docs_script("options")
    script.main([str(written)])
    current = (REPOSITORY / "docs" / "options.md").read_text()
    assert current == written.read_text(), f"run `{script.COMMAND}`"


def test_every_option_is_documented_once() -> None:
    from dataclasses import fields

    page = docs_script("options").page()
    configurations = page[: page.index("## Flags of the other commands")]
    # `sft` gives these a default of its own, or another configuration has an option of the same name.
    twice = {"learning_rate", "latent", "freeze_embeddings", "output_dir", "seed"}
    for option in fields(LatentGRPOConfig):
        assert configurations.count(f"| `{option.name}` |") == (2 if option.name in twice else 1), option.name
        assert option.metadata["help"].strip(), option.name
    assert "`exclude`, `zero`, `keep`" in configurations


def test_the_pages_show_what_the_script_draws(tmp_path: Path) -> None:
    script = docs_script("figures")
    script.main([str(tmp_path)])
    pages = ("README.md", "docs/method.md")
    shown = {name for page in pages for name in re.findall(r"figures/([\w.-]+)", (REPOSITORY / page).read_text())}
    assert shown == set(script.FIGURES) == {path.name for path in tmp_path.iterdir()}
    for name in shown:
        pattern = re.compile(r"<text[^>]*>([^<]*)</text>")
        drawn, committed = (
            {word for text in pattern.findall((folder / name).read_text()) for word in text.split()}
            for folder in (tmp_path, REPOSITORY / "docs" / "figures")
        )
        assert "Drawn" in drawn, name
        assert drawn == committed, f"{name}: run `python docs/figures.py`"
