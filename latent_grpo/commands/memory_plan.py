"""The memory of a training run, predicted from the model's configuration. No weights are read or allocated.

The prediction holds for a Llama- or Qwen-like model of which everything except the embedding table is trained. Every
term is an allocation of this package's code. `python -m bench.planner` compares the sums with measured peaks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from latent_grpo.config import LatentGRPOConfig
from latent_grpo.errors import ModelError, first_line, require
from latent_grpo.model import load_config, with_chosen_dtype
from latent_kernels import chunk_bytes

FLOAT32 = 4
RECORD_BYTES = 8 + 4  # an id and a score of a recorded component
STEP_LOGITS = {"cpu": 12, "cuda": 2}  # times a step's logits, at worst: eager sorts near-uniform rows whole
DEFAULT_PROMPT_LENGTH = 256
GIB = 2**30


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a model and bytes of an element of its parameters."""

    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    parameters: int
    trained: int  # parameters that have gradients and optimizer state
    itemsize: int

    @property
    def queries(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all key heads together."""
        return self.kv_heads * self.head_dim


@dataclass(frozen=True)
class Plan:
    """Bytes by part, in the two phases that alternate: sampling a rollout, and updating on it."""

    rollout: dict[str, int]
    update: dict[str, int]

    @property
    def peak(self) -> int:
        """Bytes at the larger of the two phases."""
        return max(sum(self.rollout.values()), sum(self.update.values()))


def model_size(config: Any, dtype: torch.dtype, freeze_embeddings: bool = True) -> ModelSize:
    """Return the sizes of the model that a transformers configuration describes. No weights are allocated."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    total = sum(p.numel() for p in model.parameters())
    frozen = model.get_input_embeddings().weight.numel() if freeze_embeddings else 0
    heads = config.num_attention_heads
    return ModelSize(
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        inner=config.intermediate_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocab=config.vocab_size,
        parameters=total,
        trained=total - frozen,
        itemsize=dtype.itemsize,
    )


def read_model_size(path: str, args: LatentGRPOConfig) -> ModelSize:
    """Return the sizes of a model folder or Hub name. Raise ModelError without a configuration like Llama's."""
    config = load_config(path)
    try:
        return model_size(config, getattr(torch, args.dtype), args.freeze_embeddings)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"cannot plan for {path!r}: {first_line(error)}") from error


def saved_a_token(size: ModelSize) -> int:
    """Return the bytes per token and layer that the backward pass needs, without keys and values.

    Two norms (their input in float32, the normalised input, the output), the queries, the attention's output, and of
    the MLP the gate, its activation, the other half and their product.
    """
    norms = 2 * size.width * (FLOAT32 + 2 * size.itemsize)
    return norms + (2 * size.queries + 4 * size.inner) * size.itemsize


def activation_bytes(
    size: ModelSize, prompts: int, prompt: int, rows: int, steps: int, recomputed: bool = False
) -> int:
    """Return the bytes that a replay of `rows` responses to `prompts` prompts keeps for the backward pass.

    Keys and values are saved as wide as the queries, since attention with a mask repeats them for each group of heads.
    A response's keys and values are joined with its prompt's. Where they were repeated, the cache holds the narrow
    ones as well. With `recomputed` (gradient checkpointing) every layer except one keeps only its input and the cache.
    """
    tokens, joined = prompts * prompt + rows * steps, rows * (prompt + steps)
    narrow = 0 if size.kv_heads == size.heads else joined * size.keys
    keys_and_values = 2 * size.itemsize * ((prompts * prompt + joined) * size.queries + narrow)
    mask = joined * steps * size.itemsize
    last_norm = tokens * size.width * (FLOAT32 + 2 * size.itemsize)
    layer = tokens * saved_a_token(size) + keys_and_values
    if recomputed:
        kept = (tokens * size.width + 2 * (prompts * prompt + joined) * size.keys) * size.itemsize
        return size.layers * kept + layer + mask + last_norm
    return size.layers * layer + mask + last_norm


def loss_bytes(size: ModelSize, rows: int, steps: int, device: str) -> int:
    """Return the bytes of the fused loss: one chunk of logits, and hidden states with their gradient.

    The head counts as trained, which allows the largest chunks.
    """
    all_logits = rows * steps * size.vocab * FLOAT32
    return min(all_logits, chunk_bytes(device, trained_head=True)) + 2 * rows * steps * size.width * size.itemsize


def cache_bytes(size: ModelSize, rows: int, length: int) -> int:
    """Return the bytes of the keys and values of `rows` slots of `length` tokens."""
    return 2 * size.layers * rows * length * size.keys * size.itemsize


def attention_bytes(size: ModelSize, rows: int, length: int) -> int:
    """Return the bytes of one layer's keys and values, repeated for the queries of each group of heads."""
    return 0 if size.kv_heads == size.heads else 2 * rows * length * size.queries * size.itemsize


def parameter_bytes(size: ModelSize, args: LatentGRPOConfig) -> dict[str, int]:
    """Return the bytes of weights, optimizer state, float32 copies and gradients."""
    masters = args.master_weights and size.itemsize < FLOAT32
    trained_in = FLOAT32 if masters else size.itemsize
    state = 2 * size.trained * (1 if args.optim == "adamw_8bit" else trained_in)
    # With float32 copies a pass has gradients in 16 bits, which are then added to the float32 gradients.
    gradients = size.trained * (trained_in + (size.itemsize if masters else 0))
    parts = {"weights": size.parameters * size.itemsize, "optimizer": state}
    if masters:
        parts["float32 copies"] = size.trained * FLOAT32
    return {**parts, "gradients": gradients}


def make_plan(size: ModelSize, args: LatentGRPOConfig, device: str) -> Plan:
    """Return the plan of a run with these options at its longest: every response runs to the limit.

    Raises ConfigError for adapters, whose parameters are not counted here.
    """
    require(not args.use_peft, "use_peft", args.use_peft, "training of adapters is not planned; leave it out")
    prompt = args.max_prompt_length or DEFAULT_PROMPT_LENGTH
    steps, rows = args.max_completion_length, args.generation_batch_size
    micro = min(args.per_device_train_batch_size, rows)
    prompts, micro_prompts = rows // args.num_generations, -(-micro // args.num_generations)
    resident = parameter_bytes(size, args)
    gradients = resident.pop("gradients")
    if args.beta > 0:
        resident["reference model"] = size.parameters * size.itemsize
    resident["record of the rollout"] = rows * steps * (args.latent_top_k * RECORD_BYTES + 32)
    # Temporaries of a step, of which only one is alive: the prompts' own cache, a layer's attention, the logits.
    step = max(
        cache_bytes(size, prompts, prompt),
        attention_bytes(size, rows, prompt + steps),
        STEP_LOGITS[device] * rows * size.vocab * FLOAT32,
    )
    activations = activation_bytes(size, micro_prompts, prompt, micro, steps, args.gradient_checkpointing)
    cache = cache_bytes(size, rows, prompt + steps)
    return Plan(
        rollout={**resident, "key-value cache": cache, "one step": step},
        update={
            **resident,
            "gradients": gradients,
            "activations": activations,
            "loss": loss_bytes(size, micro, steps, device),
        },
    )


def show_plan(path: str, args: LatentGRPOConfig) -> int:
    """Print the memory that training takes, by phase and part. Return 1 if it does not fit the GPU, else 0."""
    device = "cuda" if torch.cuda.is_available() and args.device != "cpu" else "cpu"
    args = with_chosen_dtype(args)
    size = read_model_size(path, args)
    plan = make_plan(size, args, device)
    table = Table(title=f"Memory of training {path}: {size.parameters / 1e6:.0f}M parameters, {args.dtype}")
    for column in ("GiB", "rollout", "update"):
        table.add_column(column, justify="left" if column == "GiB" else "right")
    for part in dict.fromkeys([*plan.rollout, *plan.update]):
        table.add_row(part, *(f"{x[part] / GIB:.2f}" if part in x else "-" for x in (plan.rollout, plan.update)))
    table.add_section()
    table.add_row("together", *(f"{sum(phase.values()) / GIB:.2f}" for phase in (plan.rollout, plan.update)))
    Console().print(table)
    print(
        f"{args.generation_batch_size} responses per rollout, {args.per_device_train_batch_size} per pass, prompts of "
        f"{args.max_prompt_length or DEFAULT_PROMPT_LENGTH} and responses of {args.max_completion_length} tokens"
    )
    if device == "cpu":
        return 0
    free = torch.cuda.mem_get_info()[0]
    print(f"free on {torch.cuda.get_device_name()}: {free / GIB:.2f} GiB")
    return 0 if plan.peak <= free else 1
