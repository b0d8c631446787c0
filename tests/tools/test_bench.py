"""The benchmark's command line, schema, check of correctness and measure of memory. Times are never judged."""

from __future__ import annotations

import csv
import importlib.util
import itertools
import json
import math
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.__main__ import main
from bench.harness import run
from bench.harness.cases import DTYPES, SHAPES, Parameters, Problem, Provider, Run
from bench.harness.memory import peak_extra_bytes
from bench.harness.report import Row
from bench.harness.timing import Roofline, measure_roofline, time_alternating
from bench.operators import OPERATORS
from bench.routes import Timing, table_of
from bench.routes import main as routes_main

CPU = torch.device("cpu")
LIGER = importlib.util.find_spec("liger_kernel") is not None
TRL = importlib.util.find_spec("trl") is not None
NOT_ON_A_CPU = {"ours-triton", "cut-cross-entropy"} | (set() if LIGER else {"liger"}) | (set() if TRL else {"trl"})
NOT_ON_A_CPU |= set() if hasattr(torch.nn, "LinearCrossEntropyOptions") else {"linear_cross_entropy"}
WITH_A_HEAD = ("latent_step", "latent_logprob", "fused_policy_loss")  # operators that may cap their logits
CAPPED = replace(SHAPES["tiny"], softcap=8.0)
WITHOUT_A_CAP = {"linear_cross_entropy", "liger"}
WITH_BARE_PRODUCT = ("fused_policy_loss", "latent_step")  # operators
SLOW = ("rollout_ragged", "rollout")  # operators whose tiny case takes seconds: hundreds of rows or steps
QUICK = ["--shapes", "tiny", "--device", "cpu", "--repeats", "2"]


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny inputs: more threads only wait for each other
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _known_roofline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare every call of `main` a second for the measurement of the device's limits."""
    monkeypatch.setattr(run, "measure_roofline", lambda device, dtype: Roofline(2e9, 3e12))


def each_operator(*slow: str) -> list[Any]:
    """Return all operators as parameters of a test. The named ones run only with --slow."""
    return [pytest.param(op, marks=[pytest.mark.slow] if op in slow else []) for op in OPERATORS]


def spoil(monkeypatch: pytest.MonkeyPatch, op: str, name: str, bad: Run | None = None) -> list[str]:
    """Make a provider of `op` return outputs that are off by one, or do what `bad` does. Return its timed calls."""
    operator = OPERATORS[op]
    calls: list[str] = []

    def build(parameters: Parameters, device: torch.device, dtype: torch.dtype, compile: bool) -> Problem:
        problem = operator.build(parameters, device, dtype, compile)

        def spoilt(provider: Provider) -> Provider:
            if provider.name != name:
                return provider
            wrong = bad or (lambda: tuple(out + 1 for out in provider.run()))
            return replace(provider, run=lambda: calls.append(name) or wrong(), checked=wrong)

        return replace(problem, providers=[spoilt(provider) for provider in problem.providers])

    monkeypatch.setitem(OPERATORS, op, replace(operator, build=build))
    return calls


@pytest.mark.parametrize(
    "ops",
    [[op for op in OPERATORS if op not in SLOW], pytest.param(list(SLOW), marks=pytest.mark.slow)],
    ids=["quick", "slow"],
)
def test_operators_on_the_tiny_shape(ops: list[str], tmp_path: Path) -> None:
    path, table = tmp_path / "out.json", tmp_path / "out.csv"
    assert main([*ops, *QUICK, "--no-memory", "--json", str(path), "--csv", str(table)]) == 0
    report = json.loads(path.read_text())
    assert set(report) == {"schema", "environment", "rows"}
    stamp = report["environment"]
    assert stamp["device"]
    assert stamp["torch"] == torch.__version__
    assert stamp["threads"] == 1
    assert (stamp["copy_gb_per_s"], stamp["matmul_tflop_per_s"]) == (2, 3)
    assert {row["op"] for row in report["rows"]} == set(ops)
    for row in report["rows"]:
        assert set(row) == {field.name for field in fields(Row)}
        assert (row["shape"], row["dtype"]) == ("tiny", "float32")
        assert row["peak_extra_mb"] is None
        if row["provider"] in NOT_ON_A_CPU:
            assert row["correct"] is row["median_ms"] is row["ratio"] is None
            assert row["note"].startswith("not available: ")
        else:
            assert row["correct"] is True
            assert 0 < row["p20"] <= row["median_ms"] <= row["p80"]
            assert row["samples"] == 2
            assert row["ratio"] > 0
            assert row["roofline"] > 0
            assert row["gb_per_s"] > 0
            assert (row["over_matmul"] is not None) == (row["op"] in WITH_BARE_PRODUCT)
        if row["provider"] == OPERATORS[row["op"]].baseline:
            assert row["ratio"] == 1
        if row["provider"] == "matmul":
            assert row["over_matmul"] == 1
    with table.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["provider"] for line in lines] == [row["provider"] for row in report["rows"]]
    assert json.loads(lines[0]["parameters"]) == report["rows"][0]["parameters"]


@pytest.mark.parametrize("op", each_operator(*SLOW))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_providers_are_right_in_half_precision(op: str, dtype: torch.dtype) -> None:
    for parameters in OPERATORS[op].cases(SHAPES["tiny"], CPU):
        torch.manual_seed(0)
        problem = OPERATORS[op].build(parameters, CPU, dtype, False)
        for provider in problem.providers:
            if provider.unavailable is None:
                assert (provider.check or problem.check)((provider.checked or provider.run)()) is None, provider.name


@pytest.mark.parametrize("op", each_operator(*SLOW))
def test_a_wrong_provider_is_not_timed(
    op: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = {"rollout": "ours-latent", "rollout_ragged": "ours", "rollout_prefix": "ours"}.get(op, "ours-eager")
    timed = spoil(monkeypatch, op, ours)
    path = tmp_path / "out.json"
    assert main([op, *QUICK, "--no-memory", "--json", str(path)]) == 1
    assert f"bench: error: {op}, tiny, {ours}: wrong, not timed" in capsys.readouterr().err
    assert not timed
    for row in json.loads(path.read_text())["rows"]:
        if row["provider"] == ours:
            assert row["correct"] is False
            assert row["median_ms"] is row["p20"] is row["p80"] is row["ratio"] is row["peak_extra_mb"] is None
        elif row["provider"] == OPERATORS[op].baseline:
            assert row["median_ms"] > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_soft_cap_of_a_shape_reaches_every_provider(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SHAPES, "tiny", CAPPED)
    path = tmp_path / "out.json"
    assert main([*WITH_A_HEAD, *QUICK, "--dtype", dtype, "--no-memory", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert {row["op"] for row in rows} == set(WITH_A_HEAD)
    for row in rows:
        assert row["parameters"]["softcap"] == CAPPED.softcap
        assert row["correct"] is (None if row["provider"] in NOT_ON_A_CPU | WITHOUT_A_CAP else True)
        if row["provider"] in WITHOUT_A_CAP:
            assert row["note"] == "not available: it has no soft cap"
    assert {row["provider"] for row in rows} >= WITHOUT_A_CAP


@pytest.mark.parametrize("op", WITH_A_HEAD)
def test_an_operator_that_leaves_out_the_soft_cap_is_wrong(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[f"bench.{op}"]
    operator = getattr(module, op)
    monkeypatch.setattr(module, op, lambda *inputs, softcap, **options: operator(*inputs, **options))
    for shape, right in ((CAPPED, False), (SHAPES["tiny"], True)):
        for parameters in OPERATORS[op].cases(shape, CPU):
            torch.manual_seed(0)
            problem = OPERATORS[op].build(parameters, CPU, torch.float32, False)
            (ours,) = (provider for provider in problem.providers if provider.name == "ours-eager")
            assert run.gate(problem, ours)[0] is right


@pytest.mark.parametrize(("op", "per_logit"), [("latent_step", 16), ("latent_logprob", 40), ("fused_policy_loss", 40)])
def test_a_soft_cap_costs_flops_and_no_bytes(op: str, per_logit: int) -> None:
    for parameters in OPERATORS[op].cases(CAPPED, CPU):
        plain = {name: value for name, value in parameters.items() if name != "softcap"}
        assert plain in OPERATORS[op].cases(SHAPES["tiny"], CPU)
        capped, free = (OPERATORS[op].build(case, CPU, torch.float32, False) for case in (parameters, plain))
        assert capped.flops - free.flops == per_logit * parameters["rows"] * CAPPED.vocab
        assert capped.bytes_moved == free.bytes_moved


def test_a_provider_that_returns_nan_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, "policy_loss", "ours-eager", lambda: (torch.tensor(math.nan), torch.zeros(8, 16)))
    assert main(["policy_loss", *QUICK, "--no-memory"]) == 1


def test_a_provider_that_raises_is_wrong_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> tuple[torch.Tensor, ...]:
        raise ValueError("no such thing")

    spoil(monkeypatch, "policy_loss", "ours-eager", broken)
    path = tmp_path / "out.json"
    assert main(["policy_loss", *QUICK, "--no-memory", "--json", str(path)]) == 1
    assert "failed: ValueError: no such thing" in capsys.readouterr().err
    assert json.loads(path.read_text())["rows"][0]["median_ms"] > 0


def test_rows_and_providers_can_be_chosen(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    chosen = ["--rows", "16", "32", "--providers", "eager", "ours-eager"]
    assert main(["fused_policy_loss", "policy_loss", *QUICK, "--no-memory", *chosen, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert {row["provider"] for row in rows} == {"eager", "ours-eager"}
    sizes = [row["parameters"].get("rows") for row in rows]
    assert sizes == [16, 16, 32, 32, 16, 16, 32, 32, None, None]  # two cases; the policy loss has no rows


def test_memory_measure_sees_a_known_allocation() -> None:
    size = 64 * 2**20
    assert size * 0.9 < peak_extra_bytes(lambda: (torch.ones(size // 4),), CPU) < size * 1.2
    assert peak_extra_bytes(tuple, CPU) < 2**20


@pytest.mark.parametrize(
    "providers",
    [
        ["ours-eager", "ours-triton"],
        # A process per provider and case, each of which imports torch.
        pytest.param(
            ["eager", "reference", "liger", "trl", "matmul", "ours-eager", "ours-triton"], marks=pytest.mark.slow
        ),
    ],
    ids=["ours", "all"],
)
def test_memory_of_a_provider_is_measured(providers: list[str], tmp_path: Path) -> None:
    path, rows = tmp_path / "out.json", 8192
    logits, gradient = (rows * width * 4 / 1e6 for width in (SHAPES["tiny"].vocab, SHAPES["tiny"].hidden))
    # Far above what the system's count of a process's memory is off by, and what an allocator still holds.
    assert gradient > 2
    chosen = ["--rows", str(rows), "--providers", *providers]
    assert main(["fused_policy_loss", *QUICK, *chosen, "--json", str(path)]) == 0
    peaks = [(row["provider"], row["peak_extra_mb"]) for row in json.loads(path.read_text())["rows"]]
    assert {name for name, _ in peaks} == set(providers)
    for name, peak in peaks:
        if name in NOT_ON_A_CPU:
            assert peak is None
        else:
            assert (logits if name == "eager" else gradient) * 0.9 < peak < 20 * logits, name


def test_limits_of_the_device_are_measured() -> None:
    limits = measure_roofline(CPU, torch.float32)
    assert limits.bytes_per_second > 0
    assert limits.flops_per_second > 0


def test_providers_take_turns() -> None:
    calls: list[str] = []
    runs: dict[str, Run] = {name: lambda name=name: calls.append(name) or () for name in "ab"}
    samples = time_alternating(runs, CPU, repeats=4)
    assert {name: len(times) for name, times in samples.items()} == {"a": 4, "b": 4}
    changes = sum(left != right for left, right in itertools.pairwise(calls))
    assert changes >= 4


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["no_such_op"], "'no_such_op'"),
        (["--shapes", "huge"], "'huge'"),
        (["--repeats", "0"], "'0'"),
        (["--dtype", "int8"], "'int8'"),
        (["--rows", "-1"], "'-1'"),
        (["fused_policy_loss", "--rows", "24"], "multiple of 16"),
        (["policy_loss", "--providers", "theirs"], "theirs"),
        (["--json", "no/such/directory/out.json"], "no/such/directory"),
    ],
)
def test_bad_arguments_give_one_line(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("bench: error: ")
    assert named in lines[0]


def test_the_table_of_routes_takes_the_fastest_over_both_shapes() -> None:
    routes = pytest.importorskip("latent_kernels._triton.lm_head_routes")
    small, large = routes.PRODUCTS[:2]
    timings = [Timing(16, small, [1.0, 3.0]), Timing(16, None, [2.0, 2.0]), Timing(32, large, [2.0, 2.0])]
    timings += [Timing(32, None, [1.0, 1.0])]
    table = table_of(timings, "some GPU")
    assert table["device"] == "some GPU"
    assert table["routes"] == {"16": small._asdict(), "32": None}


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_routes_are_not_measured_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert routes_main(["--out", str(tmp_path / "routes.json")]) == 2
    assert "nothing was measured or written" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
