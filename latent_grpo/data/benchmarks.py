"""The paper's eight benchmarks by name, and how the released scripts evaluate them.

Each is read from the Hub, or from a file that the user gives in its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from latent_grpo.data.released_gpqa import load_released_gpqa
from latent_grpo.data.rows import load_rows
from latent_grpo.errors import DataError


@dataclass(frozen=True)
class Benchmark:
    """Where the rows of a benchmark are."""

    hub: str  # the name of the data set on the Hub, name:config
    split: str  # the split that is evaluated
    runs: int  # of the released evaluation
    note: str = ""  # the first part of the remedy, if loading needs more than the network


# GSM-Hard, AIME24 and GPQA have only one split on the Hub, called "train". GSM8K-Aug has the test split of GSM8K.
BENCHMARKS = {
    "gsm8k-aug": Benchmark("whynlp/gsm8k-aug", "test", 5),
    "gsm-hard": Benchmark("reasoning-machines/gsm-hard", "train", 5),
    "svamp": Benchmark("ChilleD/SVAMP", "test", 5),
    "multiarith": Benchmark("ChilleD/MultiArith", "test", 5),
    "math-500": Benchmark("HuggingFaceH4/MATH-500", "test", 4),
    "aime24": Benchmark("HuggingFaceH4/aime_2024", "train", 64),
    "aime25": Benchmark("math-ai/aime25", "test", 64),
    "gpqa-diamond": Benchmark(
        "Idavidrein/gpqa:gpqa_diamond", "train", 8, "accept its terms on the Hub and log in (`hf auth login`), or "
    ),
}
GROUPS = {"low-difficulty": tuple(BENCHMARKS)[:4], "high-difficulty": tuple(BENCHMARKS)[4:]}  # as in the paper's tables
SEEDS_OF_A_BENCHMARK = 100_000  # between the seeds of a benchmark and of the next one in its group
_ALIASES = {"gsm8k": "gsm8k-aug", "aime2024": "aime24", "aime2025": "aime25", "gpqa": "gpqa-diamond"}


def benchmark_name(text: str) -> str | None:
    """Return the benchmark that `text` names, in any case and with or without hyphens and underscores, or None."""
    names = {_plain(name): name for name in BENCHMARKS} | _ALIASES
    return names.get(_plain(text))


@dataclass(frozen=True)
class ReleasedRuns:
    """How the released scripts evaluate a benchmark: `runs` times, with one sampled response per problem and run."""

    runs: int
    index: int = 0  # position of the benchmark in its group
    limit: int = 128  # of a response, in steps
    length_of: Literal["all", "finished"] = "all"  # whose lengths are averaged
    prompt_format: str | None = None  # the name of the format, for a benchmark

    def seeds(self, base: int) -> list[int]:
        """Return the seed of every run: base + 100,000 * index + the number of the run, from 1."""
        return [base + SEEDS_OF_A_BENCHMARK * self.index + run for run in range(1, self.runs + 1)]


def released_runs(label: str) -> ReleasedRuns | None:
    """Return how the released scripts evaluate the benchmark `label`, or None for other data."""
    if label not in BENCHMARKS:
        return None
    runs = BENCHMARKS[label].runs
    if label in GROUPS["low-difficulty"]:
        index = GROUPS["low-difficulty"].index(label)
        return ReleasedRuns(runs, index, 128, "finished", "latent-grpo-low")
    index = GROUPS["high-difficulty"].index(label)
    name = "latent-grpo-gpqa" if label == "gpqa-diamond" else "latent-grpo-high"
    return ReleasedRuns(runs, index, 4096, "all", name)


def load_benchmarks(
    sources: Sequence[str], *, split: str = "test", limit: int | None = None, released: bool = False, **columns: Any
) -> dict[str, list[dict[str, Any]]]:
    """Read benchmarks, files and Hub data sets into rows by label, in the order of `sources`.

    Args:
        sources: each is the name of a benchmark; `low-difficulty` or `high-difficulty`, for four benchmarks each;
            LABEL=SOURCE, for a file or a Hub name with a label, such as `gsm8k=test.jsonl`; or a file or a Hub name.
        split: the split of Hub data sets that are not benchmarks.
        limit: the number of rows to read from the start of each source; None reads all.
        released: read GPQA-Diamond as the released evaluation does, which has another order and form of the options.
        columns: prompt_column, answer_column and chain_column of `load_rows`. A benchmark on the Hub does not use them.

    Raises:
        DataError: a source cannot be loaded, or a label is given twice.
    """
    data: dict[str, list[dict[str, Any]]] = {}
    for label, source in _labelled(sources):
        if label in data:
            raise DataError(f"data {label!r} is given twice; label the second one, as other={source}")
        benchmark = BENCHMARKS.get(label)
        # A benchmark with a file in its place has its label, but another source.
        read = load_released_gpqa if released and label == "gpqa-diamond" else load_rows
        if benchmark is None or source != label:
            data[label] = read(source, split=split, limit=limit, **columns)
            continue
        try:
            data[label] = read(benchmark.hub, split=benchmark.split, limit=limit)
        except DataError as error:
            reason = str(error).partition("; ")[0]  # without the remedy for data sets in general
            raise DataError(f"{reason}; {benchmark.note}give a file in its place, as {label}=FILE.jsonl") from error
    return data


def _labelled(sources: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield (label, source) of every data set. The two are the same for a benchmark from the Hub."""
    for text in sources:
        label, mark, source = text.partition("=")
        # A "=" behind a folder or a dot belongs to the path of a file.
        if mark and label and source and not set("/\\.") & set(label):
            yield benchmark_name(label) or label, source
        elif _plain(text) in map(_plain, GROUPS):
            group = next(name for name in GROUPS if _plain(name) == _plain(text))
            yield from ((name, name) for name in GROUPS[group])
        else:
            name = benchmark_name(text)
            yield (name, name) if name else (text, text)


def _plain(text: str) -> str:
    return text.lower().replace("-", "").replace("_", "")
