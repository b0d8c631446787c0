"""What a model's layers and position embeddings allow, as its configuration tells before its weights are loaded.

A rollout decodes rows of unequal length in one batch, and replays all responses to a prompt from one cache. So a layer
must keep keys and values per token, and what it computes for a row must not depend on the padding or the neighbours of
the row. `latent_grpo.decoding_proof` proves this for what no configuration tells.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from latent_grpo.errors import DataError, ModelError
from latent_grpo.prompts import PromptFormat, longest_prompt

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
REMEDY = "use a decoder whose layers all are attention with keys and values, such as Llama or Qwen3"
# Names under which configurations list the kinds of their layers.
KIND_LISTS = ("layer_types", "layers_block_type", "block_types")
PLAIN_KINDS = {"attention": FULL}  # other names of kinds

_WARNED: set[tuple[str, int]] = set()  # model type and limit of the lengths that were warned of


def check_architecture(config: Any) -> None:
    """Raise ModelError for layers and position embeddings that rows of unequal length cannot be decoded with.

    config: the configuration of a model, or of the text part of one.
    """
    config = text_config(config)
    name = repr(config.model_type)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"model type {name} has an encoder and a decoder; use a decoder-only model")
    attention_kinds(config)
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if getattr(kind, "_is_stateful", False):
        raise ModelError(f"model type {name} has recurrent layers, which keep no keys and values per token; {REMEDY}")
    # Classes that offer ALiBi without an option for it always use it.
    builds_alibi = hasattr(sys.modules.get(getattr(kind, "__module__", "")), "build_alibi_tensor")
    if getattr(config, "alibi", builds_alibi):
        raise ModelError(f"model type {name} has ALiBi, which counts positions from the padding of a batch; {REMEDY}")


def text_config(config: Any) -> Any:
    """Return the configuration of the decoder of text, which may be a part of `config`."""
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def attention_kinds(config: Any) -> set[str]:
    """Return the kinds of attention layers of a text configuration.

    Raises:
        ModelError: a layer keeps no key-value cache per token, as slots need it.
    """
    listed = [getattr(config, name, None) for name in KIND_LISTS]
    kinds = {PLAIN_KINDS.get(kind, kind) for some in listed for kind in some or ()}
    if unknown := sorted(kinds - {FULL, SLIDING, CHUNKED}):
        raise ModelError(
            f"model type {config.model_type!r} has layers of kind {unknown[0]!r}, which keep no key-value cache per "
            f"token; {REMEDY}"
        )
    if kinds:
        return kinds
    # Configurations without such a list have layers of one kind only.
    window = getattr(config, "sliding_window", None) and not hasattr(config, "layer_types")
    return {SLIDING if window else CHUNKED if getattr(config, "attention_chunk_size", None) else FULL}


def check_length(config: Any, tokens: int) -> None:
    """Raise ModelError for rows of `tokens` tokens, prompt and response together, that are too long for the model.

    Rotary embeddings go on beyond `max_position_embeddings`, but untrained: this is warned of, once.
    """
    config = text_config(config)
    # The tightest limit has its reason in the message.
    for limit, reason in sorted(length_limits(config)):
        if tokens > limit:
            raise ModelError(
                f"prompt and response have up to {tokens} tokens, but model type {config.model_type!r} is limited to "
                f"{limit}: {reason}; shorten prompts or responses"
            )
    trained = getattr(config, "max_position_embeddings", None)
    if trained and tokens > trained and (config.model_type, trained) not in _WARNED:
        _WARNED.add((config.model_type, trained))
        warnings.warn(
            f"prompt and response have up to {tokens} tokens, but max_position_embeddings of the model is {trained}: "
            "positions beyond it are untrained",
            stacklevel=2,
        )


def check_prompt_lengths(
    config: Any, tokenizer: Any, rows: Sequence[Any] | None, prompt_format: PromptFormat, steps: int
) -> None:
    """Raise ModelError if the longest prompt of `rows` with a response of `steps` steps is too long for the model.

    Only where the model has a limit are the prompts tokenised for it. A warning waits for the prompt that deserves it.
    """
    if any(length_limits(text_config(config))):
        check_length(config, longest_prompt(tokenizer, rows or (), prompt_format) + steps)


def check_context(config: Any, lengths: Mapping[str, Sequence[int]], max_prompt_length: int | None) -> None:
    """Raise DataError for the first prompt that leaves no place for a response in the context of the model.

    lengths: tokens of the prompt of each row, by the name of the data set. Prompts over `max_prompt_length` are left to
    the option long_prompts.
    """
    context = getattr(text_config(config), "max_position_embeddings", None)
    for name, number, tokens in ((name, *row) for name, rows in lengths.items() for row in enumerate(rows, 1)):
        if context and tokens >= context and (max_prompt_length is None or tokens <= max_prompt_length):
            raise DataError(
                f"{name}, row {number}: the prompt has {tokens:,} tokens, and the model's context is {context:,}; "
                f"remove the row, or give --max_prompt_length {context - 1} --long_prompts drop, and leave room for "
                "the response"
            )


def check_own_masks(config: Any, tokens: int) -> None:
    """Raise ModelError for sequences of `tokens` tokens that need another mask than layers of the model would take.

    Given a mask [B, 1, L, L], layers of every kind use it as it is, also those that would see only a window of it.
    """
    config = text_config(config)
    windows = {SLIDING: "sliding_window", CHUNKED: "attention_chunk_size"}
    for kind in sorted(attention_kinds(config) & set(windows)):
        if tokens > (size := getattr(config, windows[kind])):
            raise ModelError(
                f"sequences have up to {tokens} tokens, but layers of model type {config.model_type!r} see {size} "
                f"({windows[kind]}), and encode masks them in another way; shorten the examples, or use a model whose "
                "layers see all tokens"
            )


def length_limits(config: Any) -> Iterator[tuple[int, str]]:
    """Yield numbers of tokens up to which a row is computed alike wherever it is computed, each with a reason."""
    positions = getattr(config, "max_position_embeddings", None)
    ropes = rope_parameters(config)
    if not ropes and (table := positions or getattr(config, "max_seq_len", None)):
        yield table, "its table of position embeddings ends there"
    for rope in ropes:
        kind = rope.get("rope_type") or rope.get("type") or "default"
        switch = rope.get("original_max_position_embeddings") if kind == "longrope" else positions
        if switch and (kind == "longrope" or "dynamic" in kind):
            yield switch, f"beyond it, rope_type {kind!r} changes all positions of a batch with its longest row"
    if CHUNKED in attention_kinds(config):
        yield config.attention_chunk_size, "its layers attend in chunks of so many tokens"
    if "local" in (getattr(config, "attention_layers", None) or ()):
        yield config.window_size, "its local layers count their window from the end of the batch"
    if getattr(config, "attn_temperature_tuning", False) and (scale := getattr(config, "floor_scale", None)):
        yield int(scale) - 1, "beyond it, attention is scaled by places in the batch, padding included"


def rope_parameters(config: Any) -> list[dict[str, Any]]:
    """Return the parameters of every rotary embedding of a text configuration: none, one, or one per kind of layer."""
    given = getattr(config, "rope_parameters", None) or {}
    flat = not all(isinstance(value, dict) for value in given.values())
    return ([given] if flat else list(given.values())) if given else []
