"""LoRA through PEFT: adapters inside the model's linear layers, which stays an ordinary model to everyone else.

Checkpoints hold only the adapters; the finished model is saved with the adapters merged, a plain Hugging Face folder.
The reference of a KL penalty is the same model with its adapters disabled.

PEFT's own functions add, disable and name the adapters. The methods that transformers puts around them refuse versions
of PEFT that work: transformers 5.24 asks for a PEFT newer than the newest release.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from latent_grpo.config import ConfigError, ModelOptions
from latent_grpo.errors import first_line
from latent_grpo.parallel.fsdp import assign

ADAPTER_FILE = "adapter_model.safetensors"
NAME = "default"  # PEFT's name of the one adapter


def add_adapters(model: Any, args: ModelOptions) -> None:
    """Freeze the model and add trainable float32 adapters to `args.lora_target_modules`. ConfigError where PEFT is not
    installed, a target is not there, or the LM head or the embedding would be adapted."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError("use_peft is True: pip install 'latent-grpo[peft]'") from error
    targets = args.lora_target_modules
    chosen = targets[0] if targets is not None and len(targets) == 1 else targets
    try:
        config = LoraConfig(r=args.lora_r, lora_alpha=args.lora_alpha, target_modules=chosen)
        inject_adapter_in_model(config, model, NAME)
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
    return bool(getattr(model, "peft_config", None))


@contextmanager
def without_adapters(model: Any) -> Iterator[None]:
    """Within, a model with adapters computes what it did before them."""
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
    """Write the model's adapters into `folder` as PEFT does, so that `PeftModel.from_pretrained` reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    parameters = {saved_name(name): p.detach().contiguous() for name, p in adapter_parameters(model)}
    save_file(parameters, folder / ADAPTER_FILE, metadata={"format": "pt"})
    model.peft_config[NAME].save_pretrained(str(folder))


@torch.no_grad()
def read_adapters(folder: Path, model: Any) -> None:
    """Read what `write_adapters` wrote into the model's own adapters. ConfigError where `folder` holds others."""
    saved = load_file(folder / ADAPTER_FILE)
    for name, parameter in adapter_parameters(model):
        assign(parameter, saved.pop(saved_name(name)))
    if saved:
        raise ConfigError(f"adapters that this model does not have: {', '.join(sorted(saved))}")


def adapter_parameters(model: Any) -> list[tuple[str, Tensor]]:
    """Name and value of every parameter of the model's adapters."""
    return [(name, p) for name, p in model.named_parameters() if f".{NAME}." in name]


def saved_name(name: str) -> str:
    """Name in PEFT's files of a parameter of an adapter."""
    return f"base_model.model.{name.replace(f'.{NAME}.', '.')}"


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
