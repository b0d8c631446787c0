"""How much of a row the selection of a latent step reads: `python -m bench.selection [--model FOLDER --text FILE]`.

No GPU is needed. Each row of logits goes through the rule of `latent_kernels/_triton/latent_step.py` in NumPy, with the
constants and the noise of the kernel. Counted are segments, segments that overflowed, and tiles of logits. The cycles
are predicted: counts times the cost of a stretch of the kernel's machine code for sm_90, as estimated without a GPU.
The text is JSON lines with `question` and `answer`; without a model, rows are nearly uniform, Zipf's and normal.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latent_kernels._noise import GUMBEL_HIGH, GUMBEL_LOW, exponential_draws
from latent_kernels._types import LatentStepOptions

# Cycles of a warp in order of issue, with 300 cycles for a load from L2: the sidecar and the first frontier; the list
# of runs, the sort and the K best of a segment; one tile of logits.
PROLOGUE, SEGMENT, TILE = 6500, 7000, 1300
ROWS = 500
BATCHES = (1, 8, 32, 64, 128, 256, 1024)
SLOTS = 264  # two blocks on each of 132 multiprocessors


def synthetic(kind: str, rows: int, vocab: int) -> torch.Tensor:
    """Return logits [rows, vocab] of a family, in random order of ids."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(rows, vocab, generator=generator)
    if kind == "nearly uniform":
        return 0.01 * noise
    if kind == "normal":
        return 2.0 * noise
    ranks = torch.stack([torch.randperm(vocab, generator=generator) for _ in range(rows)]) + 1
    return -ranks.float().log()


def of_text(model: str, text: Path, rows: int) -> torch.Tensor:
    """Return logits [rows, V] of a model at random places of the texts of a file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    causal = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    found: list[torch.Tensor] = []
    generator = torch.Generator().manual_seed(0)
    for line in text.read_text().splitlines():
        row = json.loads(line)
        ids = tokenizer(f"{row['question']}\n{row['answer']}", return_tensors="pt").input_ids
        with torch.no_grad():
            logits = causal(ids).logits[0].float()
        found.append(logits[torch.randperm(len(logits), generator=generator)[:20]])
        if 20 * len(found) >= rows:
            break
    return torch.cat(found)[:rows]


def order(logits: np.ndarray) -> np.ndarray:
    """Return the ids by falling logit, then rising id."""
    return np.lexsort((np.arange(len(logits)), -logits))


def frontiers(logits: np.ndarray, c: dict[str, Any], limit: float, span: float) -> tuple[np.ndarray, int, float]:
    """Return the sorted maxima of a noisy row, the rank of the first frontier, and the least logit above it."""
    log_z = np.logaddexp.reduce(logits.astype(np.float64))
    padded = np.full(c["BLOCK_G"] * c["WIDTH"], -np.inf)
    padded[: len(logits)] = logits
    heights = padded.reshape(c["BLOCK_G"], c["WIDTH"]).max(1)
    highest = -np.sort(-heights.reshape(-1, c["COARSE"]).max(0))
    mass = np.cumsum(np.exp(highest - log_z))
    last = 3 * c["COARSE"] // 5 if mass[-1] < 0.0625 else c["COARSE"] // 2
    nucleus = min(int((mass < limit).sum()) + 1, last)
    rank, reach = max(nucleus, c["K"]), highest[c["K"] - 1] - span
    return highest, rank, max(highest[rank - 1], reach - 1e-3 - 1e-5 * abs(reach))


def replay(logits: torch.Tensor, row: int, c: dict[str, Any], top_p: float, scale: float = 1.0) -> dict[str, Any]:
    """Return what the selection of a row with one-sided noise does, and the ids that it selects."""
    values, top_k, buffer = logits.numpy(), c["K"], c["N"]
    by_rank = order(values)
    ranked = values[by_rank].astype(np.float64)
    log_probs = ranked - np.logaddexp.reduce(ranked)
    before = np.cumsum(np.exp(log_probs)) - np.exp(log_probs)
    limit, largest = top_p if top_p < 1 else np.inf, scale * (GUMBEL_HIGH - GUMBEL_LOW)
    candidate = (before < limit) | (np.arange(len(ranked)) < top_k)
    draws = exponential_draws(torch.from_numpy(by_rank)[None], torch.tensor([row]), 0, 0)[0].numpy()
    noise = np.clip(-np.log(draws), GUMBEL_LOW, GUMBEL_HIGH) - GUMBEL_LOW
    scores = np.where(candidate, log_probs + scale * noise, -np.inf)
    counts = {"segments": 0, "overflows": 0, "tiles": 0}
    highest, rank, least = frontiers(values, c, limit, largest)
    start, end = 0, int((ranked >= least).sum())
    while True:
        runs = len(np.unique(np.flatnonzero(values >= ranked[end - 1]) // c["WIDTH"]))
        counts["tiles"] += -(-runs * c["WIDTH"] // c["TILE"])
        if end - start > buffer:
            counts["overflows"] += 1
            if ranked[start] == ranked[end - 1]:
                end = start + buffer
            else:  # the tokens with the lowest ids are a sample
                sample = np.sort(ranked[start:end][np.argsort(by_rank[start:end])[:buffer]])[::-1]
                least = sample[max(3 * buffer * buffer // (4 * (end - start)), 3)]
                end = max(int((ranked > least).sum()), start + 1)
            continue
        counts["segments"] += 1
        worst = np.sort(scores[:end])[-top_k]
        if end == len(ranked) or before[end] >= limit or log_probs[end] + largest < worst:
            break
        rank += (c["COARSE"] - rank) // 2 + 1
        least = highest[rank - 1] if rank <= c["COARSE"] else -np.inf
        needed = (log_probs >= worst - largest - 1e-3).sum()
        start, end = end, max(end, int(min(needed, (ranked >= least).sum())))
    return {**counts, "ids": by_rank[np.argsort(-scores[:end], kind="stable")[:top_k]]}


def cycles(counts: dict[str, Any]) -> int:
    """Return the predicted cycles of a row before its mixture."""
    tries = counts["segments"] + counts["overflows"]
    return PROLOGUE + SEGMENT * tries + TILE * counts["tiles"]


def summary(name: str, logits: torch.Tensor, top_k: int, top_p: float) -> dict[str, Any]:
    """Return median, mean and worst of the counts and of the cycles over the rows of logits [R, V]."""
    from latent_kernels._triton.latent_step import constants

    chosen = constants(logits.shape[1], LatentStepOptions(top_k=top_k))
    rows = [replay(row, number, chosen, top_p) for number, row in enumerate(logits)]
    result: dict[str, Any] = {"rows": name, "vocabulary": logits.shape[1], "top_k": top_k, "top_p": top_p}
    for key in ("segments", "overflows", "tiles", "cycles"):
        values = [cycles(row) if key == "cycles" else row[key] for row in rows]
        result[key] = {"median": float(np.median(values)), "mean": float(np.mean(values)), "worst": max(values)}
    result["launch"] = {str(batch): round(launch(np.array(values), batch)) for batch in BATCHES}
    return result


def launch(row_cycles: np.ndarray, batch: int) -> float:
    """Return the mean cycles of a launch of `batch` rows drawn from these, which has SLOTS blocks at a time."""
    generator = np.random.default_rng(0)
    totals = []
    for _ in range(100):
        slots = np.zeros(min(batch, SLOTS))
        for row in generator.choice(row_cycles, batch):
            slots[slots.argmin()] += row
        totals.append(slots.max())
    return float(np.mean(totals))


def main() -> None:
    """Print one JSON line for each family of rows and each top_p."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a causal language model")
    parser.add_argument("--text", type=Path, help="JSON lines with question and answer")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--top_k", type=int, default=10)
    args = parser.parse_args()
    if (args.model is None) != (args.text is None):
        parser.error("give --model and --text together, or neither")
    kinds = ("nearly uniform", "Zipf", "normal")
    families = {} if args.model is None else {"real text": of_text(args.model, args.text, args.rows)}
    for kind in [*families, *kinds]:
        logits = families.get(kind)
        logits = synthetic(kind, min(args.rows, 150), 128_256) if logits is None else logits
        for top_p in (0.95, 1.0):
            print(json.dumps(summary(kind, logits, args.top_k, top_p)), flush=True)


if __name__ == "__main__":
    main()
