"""A small set for pytest-benchmark: `python -m pytest tests/kernels/test_benchmarks.py --benchmark-only`.

In an ordinary run of the tests, each provider is checked and called, and nothing looks at its time. The same holds
under xdist, which turns benchmarks off. `python -m bench` has all operators, sizes and measures.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.harness.cases import SHAPES
from bench.harness.run import gate
from bench.operators import OPERATORS

CPU = torch.device("cpu")
SMALL_SET = ("latent_step", "mix_embeddings", "fused_policy_loss", "group_advantages")
PROVIDERS = ("eager", "ours-eager")


@pytest.mark.benchmark(max_time=0.3, min_rounds=5)
@pytest.mark.parametrize("provider_name", PROVIDERS)
@pytest.mark.parametrize("op", SMALL_SET)
def test_every_provider_is_correct_and_can_be_timed(op: str, provider_name: str, benchmark: Any) -> None:
    benchmark.group = op
    parameters = OPERATORS[op].cases(SHAPES["tiny"], CPU)[0]
    problem = OPERATORS[op].build(parameters, CPU, torch.float32, False)
    (provider,) = (provider for provider in problem.providers if provider.name == provider_name)
    correct, remark = gate(problem, provider)
    assert correct, remark
    benchmark.extra_info.update(parameters)
    benchmark(provider.run)


@pytest.mark.slow
def test_benchmark_only_times_the_providers(repository: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    chosen = ["-k", "mix_embeddings", "--benchmark-only", f"--benchmark-json={out}", "-p", "no:xdist"]
    plain = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = {**plain, "PYTHONPATH": str(repository)}
    command = [sys.executable, "-m", "pytest", "tests/kernels/test_benchmarks.py", *chosen]
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    timed = json.loads(out.read_text())["benchmarks"]
    assert {run["group"] for run in timed} == {"mix_embeddings"}
    assert len(timed) == len(PROVIDERS)
    assert all(run["stats"]["median"] > 0 and run["extra_info"]["top_k"] == 10 for run in timed)
