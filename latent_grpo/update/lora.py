"""LoRA through PEFT: adapters inside the linear layers of a model, which other code uses like any model.

A checkpoint holds only the adapters. The finished model is saved with its adapters merged, as a plain Hugging Face
folder. The reference of a KL penalty is the same model with its adapters disabled.

PEFT's own functions add, disable and name the adapters. The methods that transformers puts around these functions
refuse versions of PEFT that work: transformers 5.24 asks for a PEFT newer than the newest release.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from latent_grpo.config import AdapterOptions
from latent_grpo.errors import ConfigError, first_line
from latent_grpo.parallel.fsdp import assign

ADAPTER_FILE = "adapter_model.safetensors"  # PEFT's name of the file
ADAPTER = "default"  # PEFT's name of the only adapter


def add_adapters(model: Any, args: AdapterOptions, dropout: float = 0.0) -> None:
    """Freeze the model and add trainable float32 adapters to `args.lora_target_modules`.

    dropout: share of an adapter's inputs that is dropped in training.

    Raises:
        ConfigError: PEFT is not installed, the model has adapters already, a target does not exist, or the LM head or
            the embedding is a target.
    """
    if has_adapters(model):  # PEFT would start the existing adapters anew, and their training would be lost
        raise ConfigError("use_peft is True, but the model already has adapters; merge them first")
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError("use_peft is True: pip install peft") from error
    targets = args.lora_target_modules
    # PEFT knows "all-linear" only as a string, and takes every other string for a regular expression.
    chosen = "all-linear" if targets == ["all-linear"] else targets
    try:
        config = LoraConfig(r=args.lora_r, lora_alpha=args.lora_alpha, lora_dropout=dropout, target_modules=chosen)
        # Loaders of a checkpoint find the base model by this name.
        config.base_model_name_or_path = getattr(model, "name_or_path", None)
        inject_adapter_in_model(config, model, ADAPTER)
    except ValueError as error:
        raise ConfigError(f"lora_target_modules is {targets!r}: {first_line(error)}") from error
    # The operators read the weights of both tables directly, so an adapter on one would have no effect.
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        if hasattr(table, "base_layer"):
            raise ConfigError(f"lora_target_modules is {targets!r}: leave out the LM head and the embedding")
    # Adapters take the dtype of their layer. They are small, and 16 bits would lose small updates.
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def has_adapters(model: Any) -> bool:
    """Tell whether a model has adapters."""
    return bool(getattr(model, "peft_config", None))


@contextmanager
def without_adapters(model: Any) -> Iterator[None]:
    """Within, let a model with adapters compute what it did before they were added; do nothing to other models."""
    if not has_adapters(model):
        yield
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def write_adapters(folder: Path, model: Any) -> None:
    """Write the adapters into `folder` in PEFT's layout, which `PeftModel.from_pretrained` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    parameters = {saved_name(name): p.detach().contiguous() for name, p in adapter_parameters(model)}
    save_file(parameters, folder / ADAPTER_FILE, metadata={"format": "pt"})
    model.peft_config[ADAPTER].save_pretrained(str(folder))
    model.generation_config.save_pretrained(str(folder))


@torch.no_grad()
def read_adapters(folder: Path, model: Any) -> None:
    """Read adapters that `write_adapters` wrote into the adapters of `model`, sharded or not.

    Raises:
        ConfigError: `folder` has adapters that `model` does not have.
    """
    saved = load_file(folder / ADAPTER_FILE)
    for name, parameter in adapter_parameters(model):
        assign(parameter, saved.pop(saved_name(name)))
    if saved:
        raise ConfigError(f"adapters that this model does not have: {', '.join(sorted(saved))}")


def adapter_parameters(model: Any) -> list[tuple[str, Tensor]]:
    """Return (name, parameter) of every parameter of the adapters."""
    return [(name, p) for name, p in model.named_parameters() if f".{ADAPTER}." in name]


def saved_name(name: str) -> str:
    """Return the name that an adapter's parameter has in PEFT's files."""
    return f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}"


@torch.no_grad()
def merged_model(model: Any) -> Any:
    """Return a model without adapters that computes the same. It shares the tensors that no adapter changes."""
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if f".{ADAPTER}." in name:
            continue
        layer_name, has_base, tensor_name = name.partition(".base_layer.")
        if has_base and tensor_name == "weight":
            layer = model.get_submodule(layer_name)
            value = (value.float() + layer.get_delta_weight(ADAPTER).float()).to(value.dtype)
        state[f"{layer_name}.{tensor_name}" if has_base else name] = value
    # On the meta device the new model has no memory of its own; it takes over the tensors of `state`.
    with torch.device("meta"):
        plain = type(model)(model.config)
    plain.load_state_dict(state, assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain
