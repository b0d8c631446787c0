"""Loading of a causal LM and its tokenizer, the end marker, and the vocabulary that a run needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from latent_grpo.architecture import check_architecture
from latent_grpo.config import ModelOptions
from latent_grpo.errors import ModelError, first_line
from latent_grpo.model.access import embedding_table
from latent_grpo.model.proof import check_compatible
from latent_grpo.prompts import PromptFormat, check_ids, check_prompts

AUTO = "auto"
Options = TypeVar("Options", bound=ModelOptions)


def choose_device(device: str | None) -> str:
    """Return the device that is given, or without one the GPU if there is one, else the CPU."""
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def choose_dtype(dtype: str, device: str) -> str:
    """Return the name of the parameters' dtype on a device: "auto" is bfloat16 on CUDA, and float32 elsewhere."""
    if dtype != AUTO:
        return dtype
    return "bfloat16" if torch.device(device).type == "cuda" else "float32"


def with_chosen_dtype(options: Options) -> Options:
    """Return options that name a dtype in place of "auto"."""
    chosen = choose_dtype(options.dtype, choose_device(options.device))
    return replace(options, dtype=chosen)  # type: ignore[arg-type]


def precision_line(path: str, dtype: str, device: str | None) -> str:
    """Return the first line of a run: its model, precision and device."""
    chosen = choose_device(device)
    reason = " (dtype auto)" if dtype == AUTO else ""
    return f"{path}: {choose_dtype(dtype, chosen)} on {chosen}{reason}"


def load_tokenizer(path: str) -> Any:
    """Return the tokenizer of a local folder or Hub name. It pads on the left, with EOS if it has no padding token.

    Raises:
        ModelError: the tokenizer cannot be loaded, or has no end-of-sequence token.
    """
    check_path(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # a damaged file, or a library that is missing, can raise anything
        raise ModelError(f"cannot load a tokenizer from {path!r}: {first_line(error)}") from error
    prepare_tokenizer(tokenizer)
    return tokenizer


def prepare_tokenizer(tokenizer: Any) -> None:
    """Make a tokenizer pad on the left, with EOS if it has no padding token. ModelError if it has no EOS token."""
    if tokenizer.eos_token_id is None:
        source = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise ModelError(f"the tokenizer of {source!r} has no end-of-sequence token; set eos_token in its config")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"


def load_model(path: str, dtype: str = AUTO, device: str | None = None) -> Any:
    """Load a causal LM from safetensors, and check that latent steps are defined for it.

    Args:
        path: a local folder or a Hub name.
        dtype: the name of a torch dtype, such as "bfloat16", or "auto": bfloat16 on CUDA, float32 elsewhere.
        device: a torch device; None stands for the GPU if there is one, else for the CPU.

    Raises:
        ModelError: the model cannot be loaded or used, or `device` is not available.
    """
    check_path(path)
    device = choose_device(device)
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(f"device is {device!r}, but PyTorch sees no GPU here; choose cpu, or leave it out")
    transformers_logging.disable_progress_bar()
    config = load_config(path)
    try:
        model, loaded = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            trust_remote_code=False,
            dtype=getattr(torch, choose_dtype(dtype, device)),
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot load a causal language model from {path!r}: {first_line(error)}") from error
    # Transformers gives such weights random values, with a warning.
    if missing := sorted(loaded["missing_keys"]):
        raise ModelError(f"the files of {path!r} lack {len(missing)} weights of the model, such as {missing[0]!r}")
    if dropped := [key for key in sorted(loaded["unexpected_keys"]) if _belongs_to_layer(model, key)]:
        raise ModelError(
            f"the files of {path!r} hold {dropped[0]!r}, which {type(model).__name__} would leave out of its layer; "
            "use the model class that has this weight, or remove it from the files"
        )
    model = model.to(device)
    check_compatible(model)
    return model


def _belongs_to_layer(model: Any, key: str) -> bool:
    """Tell whether a weight that the model does not have would belong to a layer that it has, such as a bias."""
    layer = dict(model.named_modules()).get(key.rpartition(".")[0])
    own = () if layer is None or any(layer.children()) else layer.parameters(recurse=False)
    return any(True for _ in own)


def load_config(path: str) -> Any:
    """Return the configuration of a local folder or Hub name.

    Raises:
        ModelError: it cannot be loaded, or describes layers that cannot be used here. No weights are read for this.
    """
    check_path(path)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot load a causal language model from {path!r}: {first_line(error)}") from error
    check_architecture(config)
    return config


def check_path(path: str) -> None:
    """Raise ModelError if a path that cannot be a Hub name is not a folder."""
    if path.startswith((".", "/", "~")) and not Path(path).is_dir():
        raise ModelError(f"the model folder {path!r} does not exist; give a folder or a Hub name")


def end_marker_ids(tokenizer: Any, marker: str) -> list[int]:
    """Return the token ids of the end marker, of which the first one ends a latent run.

    Raises:
        ModelError: the tokenizer cannot spell the marker, or the marker holds the end-of-sequence token.
    """
    ids = list(tokenizer.encode(marker, add_special_tokens=False)) if marker else []
    # A tokenizer without the marker may replace or drop a part of it without an error; reading it back shows this.
    spelled = tokenizer.decode(ids, skip_special_tokens=False) if ids else ""
    if not ids or tokenizer.unk_token_id in ids or spelled.replace(" ", "") != marker.replace(" ", ""):
        raise ModelError(
            f"the tokenizer has no end marker {marker!r} (it reads back as {spelled!r}); "
            "choose one that it knows with --end_marker, or add the token"
        )
    if tokenizer.eos_token_id in ids:
        raise ModelError(f"the end marker {marker!r} holds the end-of-sequence token; choose another --end_marker")
    return ids


def eos_ids(model: Any, tokenizer: Any = None) -> tuple[int, ...]:
    """Return every token id that ends a response, in order.

    They are the tokenizer's, if one is given, those of the generation config, and those of the config and of its part
    for text.
    """
    found = set() if tokenizer is None else {tokenizer.eos_token_id}
    config = getattr(model, "config", None)
    for source in (getattr(model, "generation_config", None), config, getattr(config, "text_config", None)):
        value = source.get("eos_token_id") if isinstance(source, dict) else getattr(source, "eos_token_id", None)
        found |= {value} if isinstance(value, int) else set(value or ())
    # An id beyond the table cannot be emitted, and would be out of range in a mask over the vocabulary.
    vocab = len(embedding_table(model))
    return tuple(sorted(i for i in found if i < vocab))


def check_vocabulary(
    model: Any, tokenizer: Any, prompt_format: PromptFormat, latent: bool, *data: Sequence[Any] | None
) -> list[list[int]]:
    """Check every id that a run needs before its first step. Return the lengths of the prompts of each data set.

    data: rows with the key "prompt".

    Raises:
        ModelError: the end of a sequence, padding, the end marker (if responses are latent) or a prompt has an id
            without a row in the embedding table, the end marker would end the response, or a chat template refuses a
            prompt.
        DataError: a row has no prompt that can be put to a model.
    """
    prepare_tokenizer(tokenizer)
    table_rows = len(embedding_table(model))
    for name in ("eos_token", "pad_token"):
        check_ids(tokenizer, [getattr(tokenizer, f"{name}_id")], table_rows, f"the tokenizer's {name}")
    if latent:
        marker = prompt_format.end_marker
        ids = end_marker_ids(tokenizer, marker)
        check_ids(tokenizer, ids, table_rows, f"the end marker {marker!r}")
        for token in set(ids) & set(eos_ids(model)):
            raise ModelError(
                f"the end marker {marker!r} holds {tokenizer.decode([token])!r}, which ends a response; "
                "choose another --end_marker"
            )
    return [check_prompts(tokenizer, rows or (), prompt_format, table_rows) for rows in data]
