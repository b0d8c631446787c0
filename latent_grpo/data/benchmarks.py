"""The paper's eight benchmarks by name, each a Hub data set or a file given in its place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from latent_grpo.data.rows import DataError, load_rows


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark's rows are: a Hub name (name:config) and the split that is evaluated."""

    hub: str
    split: str
    note: str = ""  # what loading needs besides the network


# GSM-Hard, AIME24 and GPQA have one split on the Hub, called "train". GSM8K-Aug's test split is GSM8K's.
BENCHMARKS = {
    "gsm8k-aug": Benchmark("whynlp/gsm8k-aug", "test"),
    "gsm-hard": Benchmark("reasoning-machines/gsm-hard", "train"),
    "svamp": Benchmark("ChilleD/SVAMP", "test"),
    "multiarith": Benchmark("ChilleD/MultiArith", "test"),
    "math-500": Benchmark("HuggingFaceH4/MATH-500", "test"),
    "aime24": Benchmark("HuggingFaceH4/aime_2024", "train"),
    "aime25": Benchmark("math-ai/aime25", "test"),
    "gpqa-diamond": Benchmark(
        "Idavidrein/gpqa:gpqa_diamond", "train", "accept its terms on the Hub and log in (`hf auth login`), or "
    ),
}
GROUPS = {"low-difficulty": tuple(BENCHMARKS)[:4], "high-difficulty": tuple(BENCHMARKS)[4:]}  # the paper's columns
_ALIASES = {"gsm8k": "gsm8k-aug", "aime2024": "aime24", "aime2025": "aime25", "gpqa": "gpqa-diamond"}


def benchmark_name(text: str) -> str | None:
    """The benchmark that `text` names, whatever its case, hyphens and underscores; None where it names none."""
    wanted = _plain(text)
    known = {_plain(name): name for name in BENCHMARKS} | _ALIASES
    return known.get(wanted)


def load_benchmarks(
    sources: Sequence[str], *, split: str = "test", limit: int | None = None, **columns: str | None
) -> dict[str, list[dict[str, Any]]]:
    """Rows by label, in the order given, of benchmarks, files and Hub data sets.

    Args:
        sources: each a benchmark's name, `low-difficulty` or `high-difficulty` (four benchmarks each), LABEL=SOURCE
            (a file or a Hub name under a label, such as `gsm8k=test.jsonl`), or a file or a Hub name alone.
        split: the split of Hub names that are no benchmarks.
        limit: only the first rows of each.
        columns: prompt_column, answer_column, chain_column, as for `load_rows`.

    Raises DataError for what cannot be loaded, with the remedy, and for a label given twice.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for label, source in _labelled(sources):
        if label in found:
            raise DataError(f"data {label!r} is given twice; label the second one, as other={source}")
        known = BENCHMARKS.get(label)
        if known is None or source != label:
            found[label] = load_rows(source, split=split, limit=limit, **columns)
            continue
        try:
            found[label] = load_rows(known.hub, split=known.split, limit=limit)
        except DataError as error:
            reason = str(error).partition("; ")[0]  # without the remedy for data sets in general
            raise DataError(f"{reason}; {known.note}give a file in its place, as {label}=FILE.jsonl") from error
    return found


def _labelled(sources: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(label, source) of every data set; the two are the same for a benchmark from the Hub."""
    for text in sources:
        label, mark, source = text.partition("=")
        # A "=" behind a folder or a suffix belongs to the file's path.
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
