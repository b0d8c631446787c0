"""Figures and comparisons of benchmark results, which the tests write themselves, and the scaling of cost."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import compare, plot, scaling
from latent_grpo.watching.figures import COLOURS, INK, drawn_figure

STAMP = {
    "device": "some CPU",
    "device_type": "cpu",
    "threads": 2,
    "torch": "2.13.0",
    "triton": None,
    "commit": "abc123",
    "date": "2026-01-02T03:04:05Z",
}


def row(provider: str, ms: float | None, *, rows: int = 32, peak: float | None = 10.0, **fields: Any) -> dict[str, Any]:
    """Return a row of a report whose spread is 2% to either side of the median."""
    low, high = (None, None) if ms is None else (0.98 * ms, 1.02 * ms)
    case = {"op": "latent_step", "shape": "llama-1b", "dtype": "float32", "parameters": {"rows": rows, "vocab": 128256}}
    times = {"median_ms": ms, "p20": low, "p80": high, "samples": 0 if ms is None else 5}
    rest = {"peak_extra_mb": peak, "correct": ms is not None, "note": ""}
    return {"provider": provider, **case, **times, **rest, **fields}


def write(path: Path, rows: list[dict[str, Any]], **stamp: Any) -> Path:
    """Write a results file."""
    path.write_text(json.dumps({"schema": 1, "environment": {**STAMP, **stamp}, "rows": rows}))
    return path


def verdicts(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[str]:
    return [change.verdict for change in compare.compare_rows(before, after)]


@pytest.mark.parametrize(
    ("after", "verdict"),
    [(10.0, "same"), (10.45, "same"), (11.0, "slower"), (9.7, "same"), (9.0, "faster")],
)
def test_a_time_changes_beyond_spread_and_threshold(after: float, verdict: str) -> None:
    assert verdicts([row("ours", 10.0)], [row("ours", after)]) == [verdict]


def test_a_slower_median_within_the_spread_is_noise() -> None:
    noisy = row("ours", 12.0, p20=9.0, p80=14.0)
    assert verdicts([row("ours", 10.0)], [noisy]) == ["same"]
    assert verdicts([noisy], [row("ours", 10.0)]) == ["same"]


@pytest.mark.parametrize(
    ("before", "after", "verdict"), [(100.0, 104.0, None), (100.0, 110.0, "more memory"), (0.2, 1.0, None)]
)
def test_memory_is_compared(before: float, after: float, verdict: str | None) -> None:
    of_time_and_memory = verdicts([row("ours", 1.0, peak=before)], [row("ours", 1.0, peak=after)])
    assert of_time_and_memory == ["same"] + ([verdict] if verdict else [])


def test_providers_that_break_vanish_or_appear() -> None:
    wrong = row("ours", None, correct=False)
    assert verdicts([row("ours", 1.0)], [wrong]) == ["no longer right"]
    assert verdicts([row("ours", 1.0)], []) == ["gone"]
    assert verdicts([], [row("ours", 1.0)]) == ["new"]
    assert verdicts([wrong], [wrong]) == []


def test_cases_are_told_apart_by_their_parameters() -> None:
    before = [row("ours", 1.0, rows=1), row("ours", 9.0, rows=32)]
    assert verdicts(before, list(reversed(copy.deepcopy(before)))) == ["same", "same"]


@pytest.mark.parametrize(("after", "code"), [(10.0, 0), (20.0, 1), (5.0, 0)])
def test_compare_exits_with_1_on_a_regression(
    after: float, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [write(tmp_path / f"{ms}.json", [row("ours", ms), row("eager", 30.0)]) for ms in (10.0, after)]
    assert compare.main([*map(str, files), "--json", str(tmp_path / "changes.json")]) == code
    assert ("slower" in capsys.readouterr().out) == bool(code)
    assert len(json.loads((tmp_path / "changes.json").read_text())) == 2


def test_results_of_different_machines_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write(tmp_path / "a.json", [row("ours", 1.0)])
    other = write(tmp_path / "b.json", [row("ours", 2.0)], device="another CPU")
    assert compare.main([str(one), str(other)]) == 2
    assert "'another CPU' differ" in capsys.readouterr().err
    assert compare.main([str(one), str(other), "--any-device"]) == 1


@pytest.mark.parametrize("text", ["", "[]", '{"rows": []}', "{broken"])
def test_files_without_results_are_refused(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    for command in (lambda: compare.main([str(path), str(path)]), lambda: plot.main([str(path)])):
        assert command() == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert plot.main([str(tmp_path / "none.json")]) == 2


def test_every_operator_gets_a_figure_that_tells_what_was_measured_where(tmp_path: Path) -> None:
    rows = [row("eager", 30.0), row("ours-eager", 10.0), row("ours-triton", None)]
    rows += [row("eager", ms, rows=n, op="mix_embeddings", peak=None) for n, ms in ((1, 1.0), (8, 2.0), (64, 9.0))]
    rows.append(row("eager", None, op="policy_loss"))  # nothing timed, so nothing to draw
    path = write(tmp_path / "here.json", rows)
    assert plot.main([str(path)]) == 0
    assert sorted(p.name for p in tmp_path.glob("*.svg")) == ["here-latent_step.svg", "here-mix_embeddings.svg"]
    dots = (tmp_path / "here-latent_step.svg").read_text()
    shown = " ".join(re.findall(r"<text[^>]*>([^<]*)</text>", dots))
    for word in ("ours-eager", "llama-1b, float32", "peak memory", "some CPU, 2 threads", "torch 2.13.0", "abc123"):
        assert word in shown, word
    assert "ours-triton" not in shown
    lines = (tmp_path / "here-mix_embeddings.svg").read_text()
    assert ">rows<" in lines
    assert ">64<" in lines
    assert plot.main([str(path), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "here-latent_step.svg").read_text() == dots  # the same bytes again


def luminance(colour: str) -> float:
    """Return the relative luminance of #rrggbb (WCAG 2)."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("page", ["#ffffff", "#0d1117"])
@pytest.mark.parametrize("colour", [INK, *COLOURS])
def test_colours_stand_out_on_light_and_dark_pages(colour: str, page: str) -> None:
    low, high = sorted((luminance(colour), luminance(page)))
    assert (high + 0.05) / (low + 0.05) >= 3.0


def test_a_figure_has_no_background_and_must_have_a_caption(tmp_path: Path) -> None:
    from matplotlib.image import imread

    path = tmp_path / "x.png"
    with drawn_figure(path, 1, 1, (3, 2), caption="A line, drawn in a test.") as axes:
        axes[0, 0].plot([0, 1], [0, 1])
    assert imread(path)[0, 0, 3] == 0
    with pytest.raises(ValueError, match="no caption"), drawn_figure(path, 1, 1, (3, 2), caption=" "):
        pass


def test_scaling_measures_and_draws_every_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "VOCAB", 1024)  # nothing here depends on how long the products take
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert scaling.main(["--out", str(tmp_path), "--repeats", "2", "--points", "1"]) == 0
    torch.set_num_threads(threads)
    content = json.loads((tmp_path / "scaling.json").read_text())
    assert {point["variable"] for point in content["points"]} == set("BVKNTG")
    for point in content["points"]:
        assert 0 < point["p20"] <= point["median_ms"] <= point["p80"]
        assert (point["floor_ms"] is not None) == (point["variable"] in "BVN")
    shown = (tmp_path / "scaling.svg").read_text()
    assert "latent_step over K" in shown
    assert "least, by the model" in shown
    assert scaling.main(["--out", str(tmp_path / "none")]) == 2
