"""LoRA through PEFT: adapters inside the model's linear layers, which stays an ordinary model to everyone else.

Checkpoints hold the adapters alone; the finished model is saved with the adapters merged, a plain Hugging Face folder.
The reference of a KL penalty is the same model with its adapters disabled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from latent_grpo.config import ConfigError, ModelOptions
from latent_grpo.model import first_line
from latent_grpo.sharding import assign

ADAPTER_FILE = "adapter_model.safetensors"
NAME = "default"  # PEFT's name of the one adapter


def add_adapters(model: Any, args: ModelOptions) -> None:
    """Freeze the model and add trainable float32 adapters to `args.lora_target_modules`. ConfigError where PEFT is not
    installed, a target is not there, or the LM head or the embedding would be adapted."""
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ConfigError("use_peft is True: pip install 'latent-grpo[peft]'") from error
    targets = args.lora_target_modules
    chosen = targets[0] if targets is not None and len(targets) == 1 else targets
    try:
        model.add_adapter(LoraConfig(r=args.lora_r, lora_alpha=args.lora_alpha, target_modules=chosen))
    except ValueError as error:
        raise ConfigError(f"lora_target_modules is {targets!r}: {first_line(error)}") from error
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        if hasattr(table, "base_layer"):
            raise ConfigError(f"lora_target_modules is {targets!r}: leave out the LM head and the embedding")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def has_adapters(model: Any) -> bool:
    """Whether adapters are part of the model."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


@contextmanager
def without_adapters(model: Any) -> Iterator[None]:
    """Within, a model with adapters computes what it did before them."""
    if not has_adapters(model):
        yield
        return
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()


@torch.no_grad()
def read_adapters(folder: Path, model: Any) -> None:
    """The adapters that `model.save_pretrained` wrote into `folder`, into the model's own."""
    saved = load_file(folder / ADAPTER_FILE)
    for name, parameter in model.named_parameters():
        if f".{NAME}." in name:
            assign(parameter, saved.pop(f"base_model.model.{name.replace(f'.{NAME}.', '.')}"))
    if saved:
        raise ConfigError(f"adapters that this model does not have: {', '.join(sorted(saved))}")


@torch.no_grad()
def merged_model(model: Any) -> Any:
    """A model without adapters that computes the same; it shares the tensors that no adapter changes."""
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if f".{NAME}." in name:
            continue
        layer_name, has_base, part = name.partition(".base_layer.")
        if has_base and part == "weight":
            layer = model.get_submodule(layer_name)
            value = (value.float() + layer.get_delta_weight(NAME).float()).to(value.dtype)
        state[f"{layer_name}.{part}" if has_base else name] = value
    with torch.device("meta"):
        plain = type(model)(model.config)
    plain.load_state_dict(state, assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain
