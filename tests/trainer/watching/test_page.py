"""The page of a run: what it holds, and what a browser shows of it."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from latent_grpo import LatentGRPOConfig, LatentGRPOTrainer, RunPage
from latent_grpo.commands.main import main
from latent_grpo.quickstart.toy_task import make_model, make_problems, make_tokenizer
from latent_grpo.watching.page import LOGGED_STEPS, RESPONSES, evenly, page_data
from latent_grpo.watching.response_log import completion_steps, file_of, read_completions

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# What a person does, and what the page then shows.
VISIT = """
<pre id="seen"></pre><script>
const seen = {};
const cards = () => [...document.querySelectorAll(".card")];
const bars = card => card.querySelectorAll(".bar").length;
const set = (id, value) => { at(id).value = value; at(id).dispatchEvent(new Event("input")); };
seen.curves = document.querySelectorAll("figure svg polyline, figure svg circle").length;
seen.bars = cards().map(bars);
seen.paths = cards().map(card => (card.querySelector(".path") || {}).textContent);
const bar = document.querySelector(".bar");
bar.dispatchEvent(new MouseEvent("mouseover", {bubbles: true}));
seen.tip = [getComputedStyle(at("tip")).display, at("tip").textContent];
seen.background = getComputedStyle(bar).backgroundImage;
const all = document.querySelector(".all");
if (all) all.click();
seen.opened = cards().map(bars);
set("step", data.responses.at(-1).step); seen.step = at("count").textContent; set("step", "");
set("problem", "0"); seen.problem = at("count").textContent; set("problem", "");
set("low", "1"); seen.low = at("count").textContent; set("low", "");
at("both").click();
seen.both = [...document.querySelectorAll("section h2")].map(heading => heading.textContent);
at("seen").textContent = JSON.stringify(seen);
</script>
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the folder of a run of two steps with logged responses."""
    out = tmp_path_factory.mktemp("page") / "run"
    batch = dict(num_generations=4, generation_batch_size=8, group_filter=False, invalid="keep", max_steps=2)
    options = dict(latent_top_k=3, max_completion_length=6, temperature=1.0, top_k=0, top_p=1.0, save_steps=0)
    config = LatentGRPOConfig(output_dir=str(out), log_completions=True, logging_steps=1, **batch, **options)
    tokenizer = make_tokenizer()
    rewards = [lambda completion_ids, **columns: [float(sum(ids) % 3) for ids in completion_ids]]
    LatentGRPOTrainer(make_model(tokenizer, seed=0), rewards, config, make_problems(4, seed=1), None, tokenizer).train()
    return out


def visit(page: Path, folder: Path) -> dict:
    """Open a page in headless Chromium, do what VISIT says and return what the page then showed."""
    if BROWSER is None:
        pytest.skip("no Chromium on this machine")
    copy = folder / "visited.html"
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", VISIT + "</body>"), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}", "--dump-dom"]
    shown = subprocess.run([BROWSER, *flags, copy.as_uri()], capture_output=True, text=True, timeout=120).stdout
    return json.loads(html.unescape(re.search(r'<pre id="seen">(.*?)</pre>', shown, re.DOTALL).group(1)))


def number_shown(kept: int, of: int) -> str:
    return f"{kept} of {of} responses"


def test_a_browser_shows_steps_weights_and_filters_of_a_run(run, tmp_path, capsys):
    page = tmp_path / "run.html"
    assert main(["inspect", str(run), "--html", str(page)]) == 0
    assert str(page) in capsys.readouterr().out
    rows = [row for step in completion_steps(run) for row in read_completions(run, step)]
    seen = visit(page, tmp_path)
    assert len(rows) == 16
    assert seen["curves"] > 0
    assert seen["bars"] == [len(row["latent_steps"]) for row in rows]
    paths = ["".join(step[0]["token"] for step in row["latent_steps"]) for row in rows]
    assert seen["paths"] == [f"heaviest tokens: {path}" if path else None for path in paths]
    heaviest = next(row["latent_steps"][0][0] for row in rows if row["latent_steps"])
    display, tip = seen["tip"]
    assert display == "block"
    assert tip.splitlines()[1] == f"{heaviest['weight']:.3f}  {json.dumps(heaviest['token'], ensure_ascii=False)}"
    assert float(re.search(r"([\d.]+)%", seen["background"].split("0%", 1)[1]).group(1)) == pytest.approx(
        100 * heaviest["weight"], abs=0.02
    )
    assert seen["step"] == number_shown(8, 16)
    assert seen["problem"] == number_shown(sum(row["prompt"] == rows[0]["prompt"] for row in rows), 16)
    assert seen["low"] == number_shown(sum(row["reward"] >= 1 for row in rows), 16)
    assert seen["both"] == ["before: step 1", "after: step 2"]


def long_run(folder: Path, lengths: list[int]) -> Path:
    """Write a log of one response for each length, with text that looks like HTML, and return the run's folder."""
    (folder / "completions").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"phase": "train", "step": 1, "reward": 0.5, "grad_norm": null}\n')
    mixture = [{"token": "<b>", "weight": 0.6}, {"token": "\u2028x", "weight": 0.3}]
    facts = dict(step=1, prompt="a < b </script>", answer=None, completion="<img src=x>", reward=math.nan)
    facts |= dict(advantage=0.0, advantage_first_step=0.0, finished=False)
    rows = [{**facts, "latent_steps": [mixture] * length} for length in lengths]
    parquet.write_table(pyarrow.Table.from_pylist(rows), file_of(folder, 1))
    return folder


def test_a_browser_shows_4000_latent_steps_on_request(tmp_path):
    page = tmp_path / "page.html"
    RunPage(long_run(tmp_path / "run", [4000, 60])).write(page)
    seen = visit(page, tmp_path)
    assert (seen["bars"], seen["opened"]) == ([480, 60], [4000, 60])
    assert seen["tip"][1].split("\n") == ["latent step 1", '0.600  "<b>"', '0.300  "\u2028x"', "0.100  others"]
    assert seen["low"] == number_shown(0, 2)  # without a reward


def test_a_page_is_one_document_without_addresses_and_without_html_of_the_model(tmp_path):
    text = RunPage(long_run(tmp_path / "run", [3])).html
    assert text.count("</script>") == 2
    assert "<img" not in text
    addresses = set(re.findall(r"https?://[^\s\"']+", text))
    assert addresses == {"http://www.w3.org/2000/svg"}  # the name of a kind of element, which nothing loads
    data = json.loads(re.search(r'type="application/json">(.*?)</script>', text, re.DOTALL).group(1))
    assert data["responses"][0]["completion"] == "<img src=x>"
    assert data["responses"][0]["reward"] is None
    assert [panel["title"] for panel in data["curves"]] == ["Accuracy"]  # the norm has no figures


def test_a_notebook_shows_the_page_in_a_frame(run):
    page = RunPage(run)
    frame = page._repr_html_()
    assert html.unescape(re.search(r'srcdoc="([^"]*)"', frame).group(1)) == page.html


def test_a_page_holds_a_bounded_number_of_latent_steps(tmp_path, monkeypatch):
    monkeypatch.setattr("latent_grpo.watching.page.LATENT_STEPS", 100)
    kept = page_data(long_run(tmp_path / "run", [60, 30, 30, 30]))["responses"]
    assert [len(response["steps"]) for response in kept] == [60, 30]
    assert evenly(list(range(100)), LOGGED_STEPS)[:: LOGGED_STEPS - 1] == [0, 99]
    assert len(page_data(long_run(tmp_path / "other", [1] * 40))["responses"]) == RESPONSES


def test_a_page_that_cannot_be_written_is_one_line(run, tmp_path, capsys):
    assert main(["inspect", str(run), "--html", str(tmp_path)]) == 2
    assert "give another file" in capsys.readouterr().err
