"""The report of an evaluation: JSON, tables and figure, of one noise scale and of a sweep."""

from __future__ import annotations

import json
import re

import pytest

from latent_grpo.commands.main import main
from latent_grpo.watching.evaluation_report import evaluation_cells, mean_over_data


def test_results_as_json_and_markdown(folder, capsys):
    data = str(folder / "data.jsonl")
    out = folder / "results" / "v1.5"
    arguments = ["eval", "--model", str(folder / "model"), "--data", f"svamp={data}", f"other={data}", "--limit", "6"]
    arguments += ["--mode", "text", "--max_completion_length", "4", "--pass-at", "1,2", "--num_samples", "3"]
    arguments += ["--out", str(out)]
    assert main(arguments) == 0
    assert "mean of 2" in capsys.readouterr().out
    assert main(arguments) == 2
    assert "v1.5.json' holds an evaluation; choose another name or remove it" in capsys.readouterr().err
    record = json.loads(out.with_name("v1.5.json").read_text())
    keys = {"model", "protocol", "data", "sampling", "settings", "environment", "noise_scale", "mean", "results"}
    assert set(record) == keys
    assert list(record["results"]) == ["svamp", "other"]
    assert record["sampling"]["latent"] is False
    for result in record["results"].values():
        names = {"pass_at_1", "pass@1", "pass@2", "reasoning_steps", "response_length"}
        names |= {"end_marker_rate", "truncation_rate"}
        assert set(result["intervals"]) == names
        assert set(result) == {*names, "intervals", "num_samples", "problems", "samples"}
        assert (result["problems"], result["num_samples"], len(result["samples"])) == (6, 3, 6)
        for sample in result["samples"]:
            counts = {"reasoning_steps", "response_length", "ended", "truncated", "solved"}
            assert set(sample) == {"prompt", "answer", "response", "reward", "correct"} | counts
    page = out.with_name("v1.5.md").read_text()
    table = [line for line in page.splitlines() if line.startswith("|")]
    assert len(table) == 5 + 4  # figures, settings
    assert len({line.count(" | ") for line in table[:5]}) == 1
    assert re.search(r"\| svamp \| 6 \| 0\.\d{3} \[0\.\d{3}, 0\.\d{3}\]", page)
    assert "3 samples per problem" in page
    assert "Pass@1, noise-free" in out.with_name("v1.5.svg").read_text()


def test_a_sweep_holds_the_results_of_every_scale(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    data = str(folder / "data.jsonl")
    shared = ["eval", "--model", str(folder / "model"), "--data", f"svamp={data}", f"other={data}", "--limit", "5"]
    shared += ["--latent_top_k", "2", "--max_completion_length", "6", "--protocol", "released", "--noise", "one_sided"]
    shared += ["--runs", "2", "--pass-at", "1,2", "--latent_top_p", "1", "--temperature", "1"]
    assert main([*shared, "--noise_scale", "0", "20", "--out", str(tmp_path / "sweep")]) == 0
    assert re.search(r"svamp\s+20\s+5 ", capsys.readouterr().out)
    assert main([*shared, "--noise_scale", "20", "--out", str(tmp_path / "one")]) == 0
    sweep, one = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("sweep", "one"))
    assert [part["noise_scale"] for part in sweep["sweep"]] == [0.0, 20.0]
    assert sweep["sweep"][1] == {key: one[key] for key in ("noise_scale", "mean", "results")}
    assert sweep["sweep"][0]["results"] != one["results"]
    table = [line.split(" | ")[:2] for line in (tmp_path / "sweep.md").read_text().splitlines() if line[:2] == "| "]
    labels = ["svamp", "svamp", "other", "other", "mean of 2", "mean of 2"]
    assert table[2:8] == [[f"| {label}", scale] for label, scale in zip(labels, ["0", "20"] * 3, strict=True)]
    picture = (tmp_path / "sweep.svg").read_text()
    for text in ("noise scale 0", "noise scale 20", "svamp", "other", "bootstrap"):
        assert text in picture


def test_the_mean_row_is_the_unweighted_mean():
    def result(value: float, problems: int, **more: float) -> dict:
        figures = {"pass_at_1": value, **more}
        intervals = {name: [0.0, 1.0] for name in figures}
        return {**figures, "problems": problems, "num_samples": 0, "intervals": intervals}

    results = {"a": result(0.2, 10), "b": result(0.6, 1000)}
    assert mean_over_data(results) == {"pass_at_1": pytest.approx(0.4)}
    assert evaluation_cells({1.0: results}).rows[-1] == ["mean of 2", "", "0.400"]
    assert len(evaluation_cells({1.0: {"a": results["a"]}}).rows) == 1
    # A pass@k that one data set lacks has no mean, and no figure in its row. The columns are in the order of k.
    mixed = {"a": result(0.2, 10, **{"pass@64": 0.5, "pass@4": 0.3}), "b": result(0.6, 1000, **{"pass@4": 0.7})}
    cells = evaluation_cells({1.0: mixed})
    assert cells.headings == ["data", "problems", "Pass@1", "pass@4", "pass@64"]
    assert cells.rows[1][-1] == ""
    assert cells.rows[-1] == ["mean of 2", "", "0.400", "0.500", ""]


def test_many_figures_leave_their_intervals_to_the_page():
    names = [f"pass@{k}" for k in (1, 4, 8, 16, 32, 64)]
    figures = {**dict.fromkeys(names, 0.5), "reasoning_steps": 3.0, "response_length": 7.0}
    result = {**figures, "problems": 9, "num_samples": 64, "intervals": {name: [0.0, 1.0] for name in figures}}
    short = evaluation_cells({1.0: {"a": result}}, short=True)
    assert short.headings == ["data", "n", *(name.replace("@", " @") for name in names), "response length"]
    assert short.rows == [["a", "9", *["0.500"] * 6, "7.00"]]
    assert evaluation_cells({1.0: {"a": result}}).rows[0][2:] == ["0.500 [0.000, 1.000]"] * 6 + [
        "3.00 [0.00, 1.00]",
        "7.00 [0.00, 1.00]",
    ]


def test_a_column_of_scales_counts_as_a_figure():
    figures = dict.fromkeys(["pass_at_1", "pass@1", "pass@2", "reasoning_steps", "response_length"], 0.5)
    figures["truncation_rate"] = 0.5
    result = {**figures, "problems": 9, "num_samples": 2, "intervals": {name: [0.0, 1.0] for name in figures}}
    assert "[" in evaluation_cells({1.0: {"a": result}}, short=True).rows[0][2]
    sweep = evaluation_cells({0.0: {"a": result}, 1.0: {"a": result}}, short=True)
    assert sweep.headings == ["data", "scale", "n", "Pass@1", "pass @1", "pass @2", "response length"]
    assert "[" not in "".join(sweep.rows[0])


def test_a_mean_over_no_response_is_null_in_the_file(folder, tmp_path):
    arguments = ["eval", "--model", str(folder / "model"), "--data", str(folder / "data.jsonl"), "--limit", "2"]
    arguments += ["--max_completion_length", "1", "--length_of", "finished", "--out", str(tmp_path / "out")]
    assert main(arguments) == 0

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    record = json.loads((tmp_path / "out.json").read_text(), parse_constant=refuse)
    (result,) = record["results"].values()
    assert result["truncation_rate"] == 1
    assert result["response_length"] is None
    assert result["intervals"]["response_length"] == [None, None]
    assert "nan: all of them reach it" in (tmp_path / "out.md").read_text()
