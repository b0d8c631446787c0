"""The graph world: one candidate can be reached, chains say how, and the warm start takes their steps as they are."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_grpo.errors import DataError
from latent_grpo.quickstart.graph_world import GraphWorld, make_model, make_problems, make_tokenizer
from latent_grpo.quickstart.run import sft_config
from latent_grpo.quickstart.worlds import WORLDS
from latent_grpo.sft import build_examples


def read(prompt: str) -> tuple[dict[str, set[str]], list[str], str]:
    """Return edges, candidates and start of a prompt."""
    listed, rest = prompt.split(" to ")
    candidates, start = rest.split(" from ")
    edges: dict[str, set[str]] = {}
    for edge in listed.split():
        node, after = edge.split(">")
        edges.setdefault(node, set()).add(after)
    return edges, candidates.split(), start


def frontiers_of(edges: dict[str, set[str]], start: str) -> list[set[str]]:
    """Return the nodes after one step, after two, and so on, until nothing follows."""
    frontiers = [{start}]
    while following := set().union(*(edges.get(node, set()) for node in frontiers[-1])):
        frontiers.append(following)
    return frontiers[1:]


@settings(max_examples=25, deadline=None)
@given(
    world=st.sampled_from(
        (
            GraphWorld(),
            GraphWorld(depth=3, starts=2, width=8, dead_ends=0.3),
            GraphWorld(branching=3, candidates=2, routes=2),
        )
    ),
    seed=st.integers(0, 1000),
)
def test_one_candidate_can_be_reached_and_the_chains_reach_it(world, seed):
    for row in make_problems(3, seed=seed, world=world):
        edges, candidates, start = read(row["prompt"])
        frontiers = frontiers_of(edges, start)
        assert len(frontiers) == world.depth
        assert [set(step.split()) for step in row["latent_steps"]] == frontiers
        assert [c for c in candidates if c in frontiers[-1]] == [row["answer"]]
        assert len(set(candidates)) == world.candidates
        route, search = row["chain"].split(), row["search"].split()
        assert route[-1] == search[-1] == row["answer"]
        assert all(after in edges[node] for node, after in zip([start, *route], route, strict=False))
        assert set(search) <= set().union(*frontiers)
        assert len(search) >= len(route) == world.depth


def routes_to(edges: dict[str, set[str]], node: str, answer: str) -> int:
    """Return the number of ways from a node to the answer."""
    return sum(1 if after == answer else routes_to(edges, after, answer) for after in edges.get(node, ()))


def test_routes_and_dead_ends_are_as_asked_for():
    for row in make_problems(30, seed=0, world=GraphWorld(branching=3, candidates=2, routes=2)):
        edges, _, start = read(row["prompt"])
        assert routes_to(edges, start, row["answer"]) == 2
    world = GraphWorld(dead_ends=0.4)
    inner = [
        len(set(world.layers[1]) - read(row["prompt"])[0].keys()) for row in make_problems(300, seed=0, world=world)
    ]
    # Graphs whose start leads nowhere are drawn again, so the share is a little below 0.4.
    assert 0.3 < sum(inner) / (300 * world.width) < 0.42


def test_problems_are_distinct_and_a_function_of_the_seed():
    rows = make_problems(200, seed=5)
    assert rows == make_problems(200, seed=5)
    prompts = {row["prompt"] for row in rows}
    assert len(prompts) == 200
    assert not prompts & {row["prompt"] for row in make_problems(50, seed=5, exclude=prompts)}


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"width": 13}, "29"),
        ({"candidates": 1}, "candidates >= 2"),
        ({"dead_ends": 1.0}, "dead_ends"),
        ({"branching": 9}, "branching"),
    ],
)
def test_impossible_worlds_are_refused(form, message):
    with pytest.raises(ValueError, match=message):
        GraphWorld(**form)


def test_a_world_without_further_problems_says_so():
    with pytest.raises(ValueError, match="distinct problems"):
        make_problems(100, seed=0, world=GraphWorld(depth=1, starts=1, width=2, branching=1, candidates=2))


def test_every_word_is_a_token_and_the_model_has_a_row_for_each():
    tokenizer = make_tokenizer()
    for row in make_problems(20, seed=1):
        for text in (row["prompt"], row["chain"], row["search"], *row["latent_steps"]):
            ids = tokenizer(text)["input_ids"]
            assert len(ids) == len(text.split())
            assert tokenizer.unk_token_id not in ids
    assert make_model(tokenizer, seed=0).get_input_embeddings().weight.shape[0] == len(tokenizer)


def test_latent_steps_of_a_row_come_before_compression_and_text_keeps_the_chain(tmp_path):
    tokenizer = make_tokenizer()
    row = {"prompt": "a>d a>e to l m from a", "chain": "d l", "latent_steps": ["d e", "l m n"], "answer": "l"}
    ids = tokenizer.convert_tokens_to_ids
    options = sft_config(tmp_path, 0)
    latent = build_examples(tokenizer, [row], options)[0]
    assert latent.response[:3] == [[ids("d"), ids("e")], [ids("l"), ids("m"), ids("n")], [ids("</think>")]]
    assert latent.latents == 2
    options.latent = False
    text = build_examples(tokenizer, [row], options)[0]
    assert text.response[:3] == [[ids("d")], [ids("l")], [ids("</think>")]]
    options.latent = True
    with pytest.raises(DataError, match="row 1"):
        build_examples(tokenizer, [{**row, "latent_steps": ["d", ""]}], options)


@pytest.mark.parametrize("name", list(WORLDS))
def test_a_world_makes_problems_examples_and_a_model(name):
    world = WORLDS[name]
    problems = world.problems(5, 0)
    assert problems == world.problems(5, 0)
    assert [row["prompt"] for row in world.examples(problems, 0)] == [row["prompt"] for row in problems]
    tokenizer = world.tokenizer()
    assert world.model(tokenizer, 0).config.vocab_size == len(tokenizer)
