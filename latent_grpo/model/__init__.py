"""Access to a Hugging Face causal LM: loading and checks, its body, its tables, its end marker and its vocabulary."""

from latent_grpo.model.access import (
    CACHE_ARGUMENTS,
    backbone,
    body,
    cache_argument,
    embedding_table,
    freeze_head,
    freeze_table,
    lm_head,
    positions,
)
from latent_grpo.model.head import Head, head_logits
from latent_grpo.model.loading import (
    check_path,
    check_vocabulary,
    choose_device,
    choose_dtype,
    end_marker_ids,
    eos_ids,
    load_config,
    load_model,
    load_tokenizer,
    precision_line,
    with_chosen_dtype,
)
from latent_grpo.model.proof import check_compatible, embed, embedding_scale, head_of

__all__ = [
    "CACHE_ARGUMENTS",
    "Head",
    "backbone",
    "body",
    "cache_argument",
    "check_compatible",
    "check_path",
    "check_vocabulary",
    "choose_device",
    "choose_dtype",
    "embed",
    "embedding_scale",
    "embedding_table",
    "end_marker_ids",
    "eos_ids",
    "freeze_head",
    "freeze_table",
    "head_logits",
    "head_of",
    "lm_head",
    "load_config",
    "load_model",
    "load_tokenizer",
    "positions",
    "precision_line",
    "with_chosen_dtype",
]
