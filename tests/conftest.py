"""Fixtures that every test module shares."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import settings
from support import REPOSITORY, SHARED
from torch import Tensor

# Without a GPU, Triton's interpreter runs the kernels on CPU tensors. It must be chosen before Triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("suite", deadline=None, derandomize=True, max_examples=30, print_blob=True)
settings.load_profile("suite")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that take long (continuous integration)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip the tests marked `slow`, unless `--slow` is given."""
    if config.getoption("--slow"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow; run it with --slow"))


def pytest_configure(config: pytest.Config) -> None:
    # Tensors are tiny in tests: with two threads, waiting for the second one takes most of the time.
    torch.set_num_threads(1)
    config.addinivalue_line("markers", "golden(name): run once per case of shared/golden/NAME.npz (`golden_case`)")
    config.addinivalue_line("markers", "slow: takes long by nature; run with --slow, as .ci/run does")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise `golden_case` over the cases of the file that the `golden` marker names."""
    if "golden_case" not in metafunc.fixturenames:
        return
    marker = metafunc.definition.get_closest_marker("golden")
    assert marker is not None, "a test with golden_case needs @pytest.mark.golden(name)"
    path = SHARED / "golden" / f"{marker.args[0]}.npz"
    if not path.exists():
        missing = pytest.param(None, marks=pytest.mark.skip(reason=f"the golden vectors {path.name} are missing"))
        metafunc.parametrize("golden_case", [missing], ids=["missing"])
        return
    cases = golden_cases(path)
    metafunc.parametrize("golden_case", list(cases.values()), ids=list(cases))


def golden_cases(path: Path) -> dict[str, dict[str, Any]]:
    """Return `{case: {name: tensor or string}}` of a .npz whose keys are `c<case>_<name>`."""
    cases: dict[str, dict[str, Any]] = {}
    with np.load(path) as arrays:
        for key in arrays.files:
            case, _, name = key.partition("_")
            value = arrays[key]
            cases.setdefault(case, {})[name] = str(value) if value.dtype.kind == "U" else torch.from_numpy(value)
    for case, values in cases.items():
        values["case"] = case
    return cases


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the repository."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared material next to the repository. Tests that use it are skipped if it is missing."""
    if not SHARED.is_dir():
        pytest.skip(f"the folder {SHARED.name!r} with shared material is not next to the repository")
    return SHARED


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same state of the random generators."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


class Trajectory(NamedTuple):
    """Text rows and latent rows over logits [N, V]."""

    logits: Tensor  # [N, V]
    ids: Tensor  # [N, K]; a text row has its token first, then -100
    scores: Tensor  # [N, K]
    advantages: Tensor  # [N], positive, negative and zero


def _make_trajectory(
    rows: int = 12,
    vocab: int = 33,
    top_k: int = 4,
    *,
    margins: str = "mixed",
    text_rows: bool = True,
    logits: Tensor | None = None,
    seed: int = 0,
) -> Trajectory:
    """Return a float64 trajectory.

    `margins` is "positive", as with one-sided noise, or "mixed", with margins of both signs.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    logits = 2.0 * normal(rows, vocab) if logits is None else logits.double()
    ids = torch.stack([torch.randperm(vocab, generator=generator)[:top_k] for _ in range(rows)])
    margin = normal(rows, top_k)
    margin = margin.abs() + 0.05 if margins == "positive" else margin + 0.05 * margin.sign()
    scores = logits.log_softmax(-1).gather(-1, ids) + margin
    if text_rows:
        ids[1::3, 1:] = -100
    advantages = normal(rows)
    advantages[::5] = 0.0
    return Trajectory(logits, ids, scores, advantages)


@pytest.fixture(scope="session")
def make_trajectory() -> Callable[..., Trajectory]:
    """`make_trajectory(rows, vocab, top_k, margins=..., text_rows=..., logits=..., seed=...)`."""
    return _make_trajectory


@pytest.fixture
def short_quickstart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The quickstart takes four steps of each phase on small batches."""
    from latent_grpo.quickstart import run as module

    sft, grpo = module.sft_config, module.grpo_config
    monkeypatch.setattr(
        module, "sft_config", lambda *a: replace(sft(*a), max_steps=4, per_device_train_batch_size=8, warmup_steps=1)
    )
    monkeypatch.setattr(
        module,
        "grpo_config",
        lambda *a: replace(
            grpo(*a), max_rollouts=4, generation_batch_size=16, per_device_train_batch_size=16, eval_steps=2
        ),
    )
    monkeypatch.setattr(module, "TRAIN_PROBLEMS", 200)
    monkeypatch.setattr(module, "HELD_OUT_PROBLEMS", 40)
    monkeypatch.setattr(module, "WATCHED_PROBLEMS", 10)
