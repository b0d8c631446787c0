"""The report of a comparison: means and differences, the page and the figure."""

from __future__ import annotations

from contextlib import contextmanager

import pytest

from latent_grpo.study import compare, compare_report
from latent_grpo.study.compare import ARMS, FULL, LATENT, TEXT, make_plan
from latent_grpo.study.compare_report import cells, page, summarise
from latent_grpo.study.config import CompareConfig
from latent_grpo.watching import figures


def record(arm: str, seed: int, accuracy: float, tokens: float) -> dict:
    accuracies = {"pass_at_1": accuracy, "pass@1": accuracy / 2, "truncation_rate": 0.0}
    lengths = {"reasoning_steps": tokens, "response_length": tokens + 3}
    steps = {"steps": [5, 10], "values": [accuracy / 2, accuracy]}
    trained = ARMS[arm].start != arm
    return {
        "arm": arm,
        "seed": seed,
        "result": {**accuracies, **lengths, "problems": 50},
        "watched_pass_at_1": accuracy / 3,
        "environment": {"device": "a test", "torch": "2"},
        "seconds": {"train": 9.0, "evaluate": 1.0},
        "curves": {"eval_pass_at_1": steps, "latent/mean_length": steps} if trained else {},
    }


@pytest.fixture
def records():
    accuracies = {LATENT: (0.2, 0.3), FULL: (0.6, 0.8), TEXT: (0.4, 0.4), "text-grpo": (0.7, 0.8)}
    accuracies["margin-none"] = (0.5, 0.6)
    accuracies["loss-on-text"] = (0.3, 0.7)
    return {
        arm: [record(arm, seed, value, 2.0 + seed) for seed, value in enumerate(values)]
        for arm, values in accuracies.items()
    }


def test_means_deviations_and_differences_seed_by_seed(records):
    del records["loss-on-text"][1]
    summary = summarise(records)
    assert summary[FULL]["pass_at_1"] == {"mean": 0.7, "std": pytest.approx(0.14142), "values": [0.6, 0.8]}
    assert "difference" not in summary[FULL]
    assert summary["margin-none"]["difference"]["mean"] == pytest.approx(-0.15)
    assert summary["margin-none"]["difference"]["std"] == pytest.approx(0.07071)
    assert summary["loss-on-text"]["pass_at_1"]["std"] is None
    assert summary["loss-on-text"]["difference"]["values"] == [pytest.approx(-0.3)]
    methods, ablations = cells(summary, ablations=False), cells(summary, ablations=True)
    assert [row[0] for row in methods.rows] == ["warm start (uniform targets)", "Latent-GRPO", "text SFT", "text GRPO"]
    assert methods.rows[1][2:5] == ["0.700 ± 0.141", "0.350 ± 0.071", "2.50 ± 0.71"]
    assert [row[0] for row in ablations.rows] == ["Latent-GRPO", "no margin gradient", "loss on text steps only"]
    assert [row[-1] for row in ablations.rows] == ["", "-0.150 ± 0.071", "-0.300"]
    for table in (methods, ablations, cells(summary, True, short=True), cells(summary, False, short=True)):
        assert {len(row) for row in table.rows} == {len(table.headings)}


def test_the_figure_shows_every_arm_and_says_what_was_measured_where(records, tmp_path, monkeypatch):
    plan = make_plan(CompareConfig(output_dir=str(tmp_path), seeds=[0, 1]))
    drawn = {}

    @contextmanager
    def look(*args, caption, **options):
        with figures.drawn_figure(*args, caption=caption, **options) as axes:
            yield axes
            drawn["caption"] = caption
            for number, axis in enumerate(axes.flat):
                drawn[number] = {line.get_label(): line for line in axis.get_lines()}
                drawn[f"labels {number}"] = axis.get_legend_handles_labels()[1]

    monkeypatch.setattr(compare_report, "drawn_figure", look)
    compare_report.draw(plan, records, tmp_path / "x.png")
    assert drawn["labels 0"] == ["warm start (uniform targets)", "Latent-GRPO", "text SFT", "text GRPO"]
    assert list(drawn[1]["Latent-GRPO"].get_xdata()) == [0, 5, 10]
    assert list(drawn[1]["Latent-GRPO"].get_ydata()) == pytest.approx([(0.2 + 0.3) / 6, 0.35, 0.7])
    assert set(drawn[2]) == set(drawn[3]) == {"Latent-GRPO", "no margin gradient", "loss on text steps only"}
    assert list(drawn[3]["Latent-GRPO"].get_xdata()) == [5, 10]
    for word in ("50 held-out problems", "seeds 0, 1", "a test", "standard deviations"):
        assert word in drawn["caption"]
    from matplotlib import image

    corner = image.imread(tmp_path / "x.png")[0, 0]
    assert corner[3] == 0  # no background: the page shows through
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("colour", [*figures.COLOURS, figures.INK])
def test_colours_stand_out_on_light_and_dark_pages(colour):
    for paper in ("#ffffff", "#0d1117"):
        low, high = sorted((luminance(colour), luminance(paper)))
        assert (high + 0.05) / (low + 0.05) >= 3.0  # WCAG 2.1, graphics


def test_the_page_of_one_seed_has_no_deviation(records):
    records = {arm: runs[:1] for arm, runs in records.items()}
    plan = make_plan(CompareConfig(seeds=[0], grpo_steps=7, output_dir="elsewhere"))
    text = page(plan, records, summarise(records), {})
    assert "`latent-grpo compare --seeds 0 --grpo_steps 7`: 6 runs, 60 s together, 1 at a time." in text
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert table
    assert not any("±" in line for line in table)
    assert compare.RESULT not in text
