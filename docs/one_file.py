"""Latent-GRPO in one file: rollout, reward, advantages, fused loss, optimizer. Read it, or start your own loop from it.

    latent-grpo quickstart --out runs/quickstart           # leaves a warm start in runs/quickstart/latent-sft
    python docs/one_file.py runs/quickstart/latent-sft     # trains it: the reward rises within 40 steps

Shapes: R responses (prompts times GROUP), T response steps, K components of a mixture, V tokens, D hidden width. The
equations are those of arXiv 2604.27998. The trainer (`latent_grpo/trainer.py`) does the same and adds: prompts that are
computed once per group, rows that leave the batch when they end, dynamic sampling of groups, a KL penalty,
checkpoints, several GPUs.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from latent_grpo.model import body, positions
from latent_grpo.quickstart.graph_world import make_problems
from latent_grpo.quickstart.toy_task import END_OF_THINKING
from latent_kernels import (
    UNUSED_ID,
    fused_policy_loss,
    group_advantages,
    latent_logprob,
    latent_step_from_logits,
    mix_embeddings,
)

GROUP, PROMPTS, MINI_BATCH = 8, 64, 256  # responses per prompt, prompts per step, responses per update
LIMIT, TOP_K, TEMPERATURE = 12, 2, 0.6  # steps per response, K, temperature of text tokens


@torch.no_grad()
def sample(model, tokenizer, prompts, seed):
    """Sample one response per prompt: latent steps, the end marker, text, end of sequence."""
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    end = tokenizer.convert_tokens_to_ids(END_OF_THINKING)
    encoded = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    mask, cache = encoded["attention_mask"], DynamicCache()
    embeds = table[encoded["input_ids"]]
    in_latent = torch.ones(len(prompts), dtype=torch.bool)
    finished = torch.zeros_like(in_latent)
    steps = []
    for t in range(LIMIT):
        hidden = body(model, embeds, mask, positions(mask)[:, -embeds.shape[1] :], cache)[:, -1]
        logits = (hidden @ head.T).float()
        # Nucleus, one-sided noise, the K best scores, their mixture (Eq. 1, 12-14). A row whose highest logit is the
        # end marker leaves its latent run: is_latent is False there, and the marker is fed as an ordinary token.
        step = latent_step_from_logits(
            logits, table, top_k=TOP_K, seed=seed, step=t, latent_mask=in_latent, end_token_id=end
        )
        text = torch.multinomial((logits / TEMPERATURE).softmax(-1), 1).squeeze(-1)
        token = torch.where(in_latent, step.top_token, text)
        latent = step.is_latent.unsqueeze(-1)
        hard = torch.full_like(step.ids, UNUSED_ID)  # a text step: its token, and nothing behind it
        hard[:, 0] = token
        ids, scores = torch.where(latent, step.ids, hard), torch.where(latent, step.scores, 0.0)
        embeds = torch.where(latent, step.embedding, table[token]).unsqueeze(1)
        active = ~finished
        steps.append((token, ids, scores, active))
        mask = torch.cat([mask, active.long().unsqueeze(-1)], 1)
        finished |= ~step.is_latent & (token == tokenizer.eos_token_id)
        in_latent &= step.is_latent
        if finished.all():
            break
    tokens, ids, scores, active = (torch.stack(values, 1) for values in zip(*steps, strict=True))
    return {**encoded, "tokens": tokens, "ids": ids, "scores": scores, "mask": active, "finished": finished}


def replay(model, rollout):
    """Return the hidden states [R, T, D] that predict every response step, by teacher forcing, with gradients."""
    table = model.get_input_embeddings().weight.detach()
    rows, steps, width = rollout["ids"].shape
    # A recorded step is fed back as the same mixture, so the policy is asked about the very inputs it had.
    mixed = mix_embeddings(rollout["ids"].view(-1, width), rollout["scores"].view(-1, width), table)
    embeds = torch.cat([table[rollout["input_ids"]], mixed.view(rows, steps, -1)], 1)
    mask = torch.cat([rollout["attention_mask"], rollout["mask"].long()], 1)
    return body(model, embeds, mask, positions(mask))[:, -steps - 1 : -1]


def rewards_of(tokenizer, rollout, answers):
    """Return 1 for a response whose text after the end marker is the answer, else 0. [R]"""
    texts = [
        tokenizer.decode(row[used], skip_special_tokens=True).rpartition(END_OF_THINKING)[2].strip()
        for row, used in zip(rollout["tokens"], rollout["mask"], strict=True)
    ]
    return torch.tensor([float(text == answer) for text, answer in zip(texts, answers, strict=True)])


def train_step(model, tokenizer, optimizer, problems, seed):
    """Run one step of Latent-GRPO and return the mean reward."""
    repeated = [problem for problem in problems for _ in range(GROUP)]
    rollout = sample(model, tokenizer, [problem["prompt"] for problem in repeated], seed)
    rewards = rewards_of(tokenizer, rollout, [problem["answer"] for problem in repeated])
    mask, head = rollout["mask"], model.get_output_embeddings().weight.detach()
    with torch.no_grad():  # log-probs of text steps, surrogate log-probs of latent steps (Eq. 15)
        flat = replay(model, rollout).flatten(0, 1)
        ids, scores = rollout["ids"].flatten(0, 1), rollout["scores"].flatten(0, 1)
        old_logprob = latent_logprob(flat, head, ids, scores, temperature=TEMPERATURE).view(mask.shape)
    # Rewards relative to their group. Responses cut off by the limit get no advantage (Eq. 9-11, 18-21). The trainer
    # also selects one correct path at the first step; here every right response keeps its advantage there.
    groups = torch.arange(len(rewards)) // GROUP
    result = group_advantages(rewards, groups, invalid_mask=~rollout["finished"], first_token="all")
    advantages = result.advantages.unsqueeze(-1).expand(mask.shape)
    for rows in torch.randperm(len(rewards)).split(MINI_BATCH):
        part = {name: value[rows] for name, value in rollout.items()}
        # Log-probs, clipped loss and gradient of a chunk of steps at a time: no [N, V] tensor (Eq. 16-17, 22-23).
        loss, _ = fused_policy_loss(
            replay(model, part),
            head,
            part["ids"],
            part["scores"],
            old_logprob[rows],
            advantages[rows],
            part["mask"],
            temperature=TEMPERATURE,
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return rewards.mean().item()


def main(arguments=None):
    """Train a warm start of the graph world."""
    parser = argparse.ArgumentParser(description="Latent-GRPO in one file, on the quickstart's graph world.")
    parser.add_argument("model", help="folder of a warm start, such as runs/quickstart/latent-sft")
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    model.get_input_embeddings().requires_grad_(False)  # and with it the tied head
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-4)
    problems, rewards = make_problems(options.steps * PROMPTS, seed=0), []
    for step in range(options.steps):
        batch = problems[step * PROMPTS : (step + 1) * PROMPTS]
        rewards.append(train_step(model, tokenizer, optimizer, batch, seed=step))
        print(f"step {step + 1:3d}  reward {rewards[-1]:.3f}", flush=True)
    return rewards


if __name__ == "__main__":
    main()
