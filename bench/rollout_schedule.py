"""What the schedule of a rollout saves: finished rows leave the batch, prompts are prefilled once per group.

`rollout_ragged`: 64 prompts with 8 responses each. One response in eight runs to the limit, the others stop after a
few tokens. The baseline keeps every row to the end.
`rollout_prefix`: a prompt of 512 tokens and the first step of its 8 responses. The baseline is one pass over the
prompt.
"""

from __future__ import annotations

import torch

from bench.harness.cases import Operator, Outputs, Parameters, Problem, Provider, Shape
from bench.rollout import make_model
from latent_grpo import LatentSampling, generate_latent
from latent_grpo.model import body, embedding_table, lm_head, positions
from latent_grpo.rollout import generate as generation
from latent_grpo.rollout.trajectory import Rollout

GENERATIONS = 8
PROMPTS, PROMPT_TOKENS, LIMIT = 64, 16, 64
LONG_PROMPT = 512
EOS = 1
STOPS = 0.25  # chance of EOS per step of a short response
TEXT_TOP_K = 30
MODELS = ("tiny", "smollm2", "llama-1b")


def ragged_cases(shape: Shape, device: torch.device) -> list[Parameters]:
    """Return one case per model that the device can hold in this batch: on a CPU only the tiny one."""
    if shape.name not in (MODELS if device.type == "cuda" else MODELS[:1]):
        return []
    return [{"model": shape.name, "hidden": shape.hidden, "vocab": shape.vocab, "rows": PROMPTS * GENERATIONS}]


def build_ragged(parameters: Parameters, device: torch.device, dtype: torch.dtype, compile: bool) -> Problem:
    """Build a case. Outputs: the mask and the tokens of all responses, each [512, 64]."""
    model, vocab = make_model(parameters, device, dtype), parameters["vocab"]
    _make_markov(model, vocab)
    prompts = torch.randint(2, vocab // 2, (PROMPTS, PROMPT_TOKENS), device=device)
    prompts[::GENERATIONS, -1] = vocab - 1  # these prompts get responses that run to the limit
    mask = torch.ones_like(prompts)
    sampling = LatentSampling(
        latent=False, max_new_tokens=LIMIT, temperature=1.0, top_k=TEXT_TOP_K, top_p=1.0, eos_token_id=EOS
    )

    def sample() -> Outputs:
        rollout: Rollout = generate_latent(model, prompts, mask, sampling, num_generations=GENERATIONS)
        return rollout.mask, rollout.token * rollout.mask

    def keep() -> Outputs:
        # No option turns the schedule off: nobody but this benchmark wants the slower way.
        share, generation.COMPACT_BELOW = generation.COMPACT_BELOW, 0.0
        try:
            return sample()
        finally:
            generation.COMPACT_BELOW = share

    expected = keep()

    def check(outputs: Outputs) -> str | None:
        full = outputs[0].all(-1).float().mean().item()
        if abs(full - 1 / GENERATIONS) > 0.05:
            return f"{full:.0%} of the rows run to the limit, expected one in {GENERATIONS}"
        # In 16 bits the products of a smaller batch round differently, which changes a token now and then.
        same = dtype != torch.float32 or all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
        return None if same else "trajectories differ from those of a batch that keeps every row"

    weights, tokens = sum(p.numel() for p in model.parameters()), int(expected[0].sum())
    return Problem(
        [Provider("kept", keep), Provider("ours", sample)],
        check,
        bytes_moved=weights * model.dtype.itemsize * LIMIT,
        flops=2 * weights * tokens,
    )


def _make_markov(model: torch.nn.Module, vocab: int) -> None:
    """Change a model such that the next token depends only on the half of the vocabulary that the last token is in.

    Tokens of the upper half follow one another and never end. Tokens of the lower half follow one another and end with
    probability STOPS per step. The layers still cost their full time but add nothing to the residual stream.
    """
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.data.zero_()
    table = embedding_table(model)
    head = torch.randn_like(table) * 0.02
    model.lm_head.weight = torch.nn.Parameter(head)  # type: ignore[union-attr]
    upper = torch.zeros(vocab, device=table.device, dtype=torch.bool)
    upper[vocab // 2 :] = True
    with torch.no_grad():
        # The first unit of the hidden state holds the half; the first column of the head reads it.
        table[:, 0] = torch.where(upper, 1.0, -1.0)
        unit = 30.0 / len(table[0]) ** 0.5
        head[:, 0] = torch.where(upper, unit, -unit)
        # Top-k sampling leaves EOS and 29 other candidates of nearly equal logit. These odds give EOS the chance STOPS.
        odds = (TEXT_TOP_K - 1) * STOPS / (1 - STOPS)
        hidden = body(model, table[None, 2:3], torch.ones(1, 1, device=table.device), torch.zeros(1, 1).long())
        scale = float(hidden[0, 0, 0])
        head[EOS] = 0.0
        head[EOS, 0] = -unit + torch.log(torch.tensor(odds)).item() / scale


def prefix_cases(shape: Shape, device: torch.device) -> list[Parameters]:
    """Return one case per model that the device can hold."""
    if shape.name not in MODELS[: 3 if device.type == "cuda" else 2]:
        return []
    case = {"model": shape.name, "hidden": shape.hidden, "vocab": shape.vocab}
    return [{**case, "prompt": LONG_PROMPT, "rows": GENERATIONS}]


def build_prefix(parameters: Parameters, device: torch.device, dtype: torch.dtype, compile: bool) -> Problem:
    """Build a case. Outputs: log-probs [8] of the first tokens.

    The baseline scores the tokens that our provider sampled, by one pass over the prompt.
    """
    model = make_model(parameters, device, dtype)
    prompt = torch.randint(2, parameters["vocab"], (1, LONG_PROMPT), device=device)
    mask = torch.ones_like(prompt)
    sampling = LatentSampling(latent=False, max_new_tokens=1, temperature=1.0, eos_token_id=())

    def sample() -> Rollout:
        return generate_latent(model, prompt, mask, sampling, num_generations=GENERATIONS)

    tokens = sample().token[:, 0]

    def one_pass() -> Outputs:
        with torch.no_grad():
            hidden = body(model, embedding_table(model)[prompt], mask, positions(mask))[0, -1]
            return ((hidden @ lm_head(model).T).float().log_softmax(-1)[tokens],)

    expected = one_pass()[0]

    def check(outputs: Outputs) -> str | None:
        gap = (outputs[0] - expected).abs().max().item()
        limit = 1e-4 if dtype == torch.float32 else 0.1
        return None if gap <= limit else f"log-probs differ from those of a pass over the prompt by {gap:.2g}"

    weights = sum(p.numel() for p in model.parameters())
    return Problem(
        [Provider("one-pass", one_pass), Provider("ours", lambda: (sample().logprob[:, 0],))],
        check,
        bytes_moved=weights * model.dtype.itemsize,
        flops=2 * weights * LONG_PROMPT,
    )


ROLLOUT_RAGGED = Operator("rollout_ragged", ragged_cases, build_ragged, baseline="kept")
ROLLOUT_PREFIX = Operator("rollout_prefix", prefix_cases, build_prefix, baseline="one-pass")
