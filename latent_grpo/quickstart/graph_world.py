"""The graph world: which of some candidates can be reached? Problems, a word-level tokenizer and a tiny Llama.

The edges of a graph lead from layer to layer, two from each node. The prompt lists them in random order, then some
candidates of the last layer and a start in the first. Exactly one candidate can be reached:

    prompt    "f>r b>i d>r a>d a>h j>q ... to s p r g from a"
    frontiers "d h", "r t s"    every node after one step, every node after two
    route     "d r"             one way to the answer
    search    "h s t d r"       a depth-first search, with its dead ends
    answer    "r"

A latent step is a mixture of tokens, so it can hold a frontier, the whole result of a breadth-first search. A step of
text is one node: it must choose, or write down a search. The warm start learns frontiers in which every node weighs the
same. A mixture of K tokens holds a frontier of more than K nodes in part only, so which nodes weigh more is what
reinforcement has to learn.

Names of nodes belong to layers, and an edge such as `a>d` is one token, so looking up edges is learned in minutes.
Everything is made on the spot from seeds. Nothing is downloaded.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise
from string import ascii_lowercase
from typing import Any

from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from latent_grpo.quickstart.toy_task import tiny_llama, word_tokenizer

Edges = dict[str, list[str]]  # the nodes that a node leads to
TRIES = 1000  # graphs that are drawn for one problem


@dataclass(frozen=True)
class GraphWorld:
    """The form of the graphs. The defaults are the quickstart's. Raises ValueError for an impossible form."""

    depth: int = 2  # edges from the start to the candidates
    starts: int = 3  # nodes of the first layer
    width: int = 8  # nodes of every other layer
    branching: int = 2  # edges from a node
    candidates: int = 4
    dead_ends: float = 0.0  # share of the nodes between start and candidates that lead nowhere
    routes: int = 0  # distinct routes from the start to the answer; 0: any number

    def __post_init__(self) -> None:
        nodes = self.starts + self.depth * self.width
        if min(self.depth, self.starts, self.branching) < 1 or self.candidates < 2 or self.routes < 0:
            raise ValueError(f"need depth, starts, branching >= 1, candidates >= 2 and routes >= 0, got {self}")
        if not 0 <= self.dead_ends < 1:
            raise ValueError(f"need 0 <= dead_ends < 1, got {self.dead_ends}")
        if not max(self.branching, self.candidates) <= self.width or nodes > len(ascii_lowercase):
            raise ValueError(
                f"need branching and candidates <= width and at most {len(ascii_lowercase)} nodes, got {nodes}: {self}"
            )

    @property
    def layers(self) -> list[str]:
        """The names of the nodes, layer by layer."""
        ends = [self.starts + self.width * i for i in range(self.depth + 1)]
        return [ascii_lowercase[start:end] for start, end in pairwise([0, *ends])]


def make_problems(
    n: int, *, seed: int, exclude: Collection[str] = (), world: GraphWorld | None = None
) -> list[dict[str, Any]]:
    """Return `n` problems with distinct prompts, the same ones for the same seed.

    Each row has `prompt`, `answer`, `latent_steps` (the frontiers, a text of nodes each) and two chains of text:
    `chain` (a route to the answer) and `search` (a depth-first search that finds it).
    exclude: prompts that must not occur, such as those of a held-out set.
    Raises ValueError if the world seems to have no further problems.
    """
    world = world or GraphWorld()
    rng = random.Random(seed)
    seen = set(exclude)
    rows: list[dict[str, Any]] = []
    for _ in range(n):
        for _ in range(TRIES):
            row = _problem(rng, world)
            if row is not None and row["prompt"] not in seen:
                break
        else:
            raise ValueError(f"found only {len(rows)} distinct problems of n = {n} in {world}; widen it or lower n")
        seen.add(row["prompt"])
        rows.append(row)
    return rows


def _problem(rng: random.Random, world: GraphWorld) -> dict[str, Any] | None:
    """Return the row of a random graph, or None if it has too few nodes out of reach, or another number of routes."""
    edges = _edges(rng, world)
    start = rng.choice(world.layers[0])
    reached, routes = [[start]], [[start]]
    for _ in range(world.depth):
        reached.append(sorted({after for node in reached[-1] for after in edges.get(node, [])}))
        routes = [[*route, after] for route in routes for after in edges.get(route[-1], [])]
    ends = {after for afters in edges.values() for after in afters}
    out_of_reach = [node for node in world.layers[-1] if node in ends and node not in reached[-1]]
    if not reached[-1] or len(out_of_reach) < world.candidates - 1:
        return None
    answer = rng.choice(reached[-1])
    right = [route for route in routes if route[-1] == answer]
    if world.routes and len(right) != world.routes:
        return None
    listed = [f"{node}>{after}" for node, afters in edges.items() for after in afters]
    candidates = [answer, *rng.sample(out_of_reach, world.candidates - 1)]
    rng.shuffle(listed)
    rng.shuffle(candidates)
    return {
        "prompt": f"{' '.join(listed)} to {' '.join(candidates)} from {start}",
        "latent_steps": [" ".join(nodes) for nodes in reached[1:]],
        "chain": " ".join(rng.choice(right)[1:]),
        "search": " ".join(_search(start, answer, edges, rng)),
        "answer": answer,
    }


def _edges(rng: random.Random, world: GraphWorld) -> Edges:
    """Return the edges of a random graph. Every node of the first layer has some."""
    edges: Edges = {}
    for number, (layer, following) in enumerate(pairwise(world.layers)):
        for node in layer:
            if number == 0 or rng.random() >= world.dead_ends:
                edges[node] = rng.sample(following, world.branching)
    return edges


def _search(node: str, answer: str, edges: Edges, rng: random.Random) -> list[str]:
    """Return the nodes below `node` that a depth-first search for the answer visits, in their order."""
    visited: list[str] = []
    afters = edges.get(node, [])
    for after in rng.sample(afters, len(afters)):
        visited += [after, *(_search(after, answer, edges, rng) if after != answer else [])]
        if visited[-1] == answer:
            break
    return visited


def make_tokenizer(world: GraphWorld | None = None) -> PreTrainedTokenizerFast:
    """Return the world's word-level tokenizer: a node, an edge and `</think>` are one token each."""
    layers = (world or GraphWorld()).layers
    edges = [f"{a}>{b}" for layer, after in pairwise(layers) for a in layer for b in after]
    return word_tokenizer(["from", "to", *"".join(layers), *edges])


def make_model(tokenizer: PreTrainedTokenizerFast, *, seed: int) -> LlamaForCausalLM:
    """Return a randomly initialised float32 Llama of 0.17 million parameters with tied embeddings.

    The global random state of torch stays as it was.
    """
    # Distances are short. With this base and this spread of weights, look-ups are found in few steps.
    found_soon = {"rope_parameters": {"rope_type": "default", "rope_theta": 10.0}, "initializer_range": 0.06}
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3}
    return tiny_llama(tokenizer, seed, tie_word_embeddings=True, **found_soon, **sizes)
