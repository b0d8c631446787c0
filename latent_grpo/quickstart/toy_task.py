"""The toy task of `latent-grpo quickstart`: word problems, a word-level tokenizer and a tiny Llama.

In a problem a person has some objects and gains and loses some of them a few times. The question is how many there are
now:

    prompt   "Mia has 2 shells. wins 2, loses 1. How many now?"
    chain    "4 3"             the running totals, in the order of the story
    answer   "3"

Two chain tokens make one latent step, so a latent step stands for two consecutive totals.

The examples of the warm start (`worked_examples`) are the work of a careless author. In a share of them the last change
is forgotten: the chain repeats the total before the change, and the answer is that total. The answer can therefore be
read only from the latent steps, and the mixtures of the warm start hold both totals, usually with more weight on the
wrong one. The warm start knows its sums, but its mixtures are imprecise. Reinforcement rewards true answers and can
learn the right weights.

Everything is made on the spot from seeds. Nothing is downloaded.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

NAMES = ("Mia", "Tom", "Ana", "Leo", "Zoe", "Sam", "Eva", "Max")
OBJECTS = ("apples", "coins", "books", "cards", "shells", "stamps", "pens", "nuts")
GAIN_VERBS = ("buys", "finds", "gets", "wins")
LOSS_VERBS = ("loses", "sells", "eats", "gives")
FILLER_WORDS = ("has", "How", "many", "now", ".", ",", "?")
NUMBERS = 100  # 0 .. 99 are tokens
FORGOTTEN = 0.4  # share of the warm start's examples that forget the last change

PAD_TOKEN = "<pad>"
UNK_TOKEN = "<unk>"
EOS_TOKEN = "<eos>"
END_OF_THINKING = "</think>"


@dataclass(frozen=True)
class ToyTask:
    """The range of the problems. The defaults are the quickstart's. Raises ValueError for an impossible range."""

    min_changes: int = 2
    max_changes: int = 4
    max_operand: int = 2  # the first total and every change are 1 .. max_operand
    max_total: int = 6

    def __post_init__(self) -> None:
        if not 1 <= self.min_changes <= self.max_changes:
            raise ValueError(f"need 1 <= min_changes <= max_changes, got {self.min_changes} and {self.max_changes}")
        # A change above the total is always a gain, and 2 * max_operand leaves room for it.
        if not 1 <= 2 * self.max_operand <= self.max_total < NUMBERS:
            raise ValueError(
                f"need 2 <= 2 * max_operand <= max_total < {NUMBERS}, got {self.max_operand} and {self.max_total}"
            )


def make_problems(
    n: int, *, seed: int, exclude: Collection[str] = (), task: ToyTask | None = None
) -> list[dict[str, str]]:
    """Return `n` problems with distinct prompts, the same ones for the same seed.

    Each row has `prompt`, `chain` (numbers separated by spaces) and `answer`.
    exclude: prompts that must not occur, such as those of a held-out set.
    Raises ValueError if the task seems to have fewer than `n` further prompts.
    """
    task = task or ToyTask()
    rng = random.Random(seed)
    seen = set(exclude)
    rows: list[dict[str, str]] = []
    repeats = 0
    while len(rows) < n:
        row = _problem(rng, task)
        if row["prompt"] in seen:
            repeats += 1
            if repeats > 1000 + 20 * n:
                raise ValueError(f"found only {len(rows)} distinct problems of n = {n}; widen the task or lower n")
            continue
        seen.add(row["prompt"])
        rows.append(row)
    return rows


def _problem(rng: random.Random, task: ToyTask) -> dict[str, str]:
    total = rng.randint(1, task.max_operand)
    story = f"{rng.choice(NAMES)} has {total} {rng.choice(OBJECTS)}."
    totals, clauses = [total], []
    for _ in range(rng.randint(task.min_changes, task.max_changes)):
        change = rng.randint(1, task.max_operand)
        gain = total < change or (total + change <= task.max_total and rng.random() < 0.5)
        total += change if gain else -change
        clauses.append(f"{rng.choice(GAIN_VERBS if gain else LOSS_VERBS)} {change}")
        totals.append(total)
    # Every latent step is a pair of totals, so their number must be even: an odd number loses the first amount.
    chain = totals[len(totals) % 2 :]
    prompt = f"{story} {', '.join(clauses)}. How many now?"
    return {"prompt": prompt, "chain": " ".join(map(str, chain)), "answer": str(total)}


def worked_examples(
    problems: Sequence[dict[str, str]], *, seed: int, forgotten: float = FORGOTTEN
) -> list[dict[str, str]]:
    """Return rows for the warm start, in which a share `forgotten` of the problems is worked without the last change.

    In such a row the last total repeats the total before it. Its last latent step is then that one total, and so is its
    answer.
    """
    rng = random.Random(seed)
    return [_forget_last_change(row) if rng.random() < forgotten else dict(row) for row in problems]


def _forget_last_change(row: dict[str, str]) -> dict[str, str]:
    chain = row["chain"].split()
    chain[-1] = chain[-2]
    return {**row, "chain": " ".join(chain), "answer": chain[-1]}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return the task's word-level tokenizer: one token per word, number or punctuation mark, `</think>` one token."""
    words = [*map(str, range(NUMBERS)), *NAMES, *OBJECTS, *GAIN_VERBS, *LOSS_VERBS, *FILLER_WORDS]
    return word_tokenizer(words, pre_tokenizers.Whitespace())


def word_tokenizer(words: Sequence[str], cut: Any = None) -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer. cut: the pre-tokenizer that finds the words; the default cuts at white space.

    There is no BOS token. `</think>` is not a special token: it survives `skip_special_tokens=True`, as it does with
    the tokenizers of released reasoning models.
    """
    words = [PAD_TOKEN, UNK_TOKEN, EOS_TOKEN, END_OF_THINKING, *words]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNK_TOKEN))
    tokenizer.pre_tokenizer = cut or pre_tokenizers.WhitespaceSplit()
    # An added token is cut out before the pre-tokenizer, which would split it at its punctuation.
    tokenizer.add_tokens([AddedToken(END_OF_THINKING, special=False, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        unk_token=UNK_TOKEN,
        eos_token=EOS_TOKEN,
        padding_side="left",
        model_max_length=128,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, *, seed: int, tied: bool = True) -> LlamaForCausalLM:
    """Return a randomly initialised float32 Llama of 0.66 million parameters. `tied`: it shares its embeddings.

    The global random state of torch stays as it was.
    """
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3}
    return tiny_llama(tokenizer, seed, tie_word_embeddings=tied, **sizes)


def tiny_llama(tokenizer: PreTrainedTokenizerFast, seed: int, **options: Any) -> LlamaForCausalLM:
    """Return a randomly initialised float32 Llama with four heads for the vocabulary of a world.

    options: of `LlamaConfig`. The global random state of torch stays as it was.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).float()
