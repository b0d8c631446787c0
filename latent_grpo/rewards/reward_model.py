"""A trained reward model: a sequence classifier with one label, called like a reward function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from latent_grpo.errors import first_line
from latent_grpo.model.finite import first_not_finite

BATCH = 16  # texts of one forward pass


class RewardModel:
    """The rewards of texts by a sequence classifier: its only logit at the last token of prompt and response.

    It reads the visible text of a response, because it was trained on text: the most probable tokens of latent steps
    are none.

    Args:
        model: a sequence classifier of transformers with one label. It is put into evaluation mode.
        tokenizer: its tokenizer. Without a padding token, the end-of-sequence token pads.

    Attributes:
        __name__: the last part of the model's name, which metrics and logs use.
    """

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        config: Any = model.config
        config.get_text_config().pad_token_id = tokenizer.pad_token_id  # the model finds the last token by it
        self.__name__ = str(config._name_or_path).rstrip("/").rpartition("/")[2] or type(model).__name__

    @classmethod
    def load(cls, path: str, tokenizer: Any = None, device: Any = None) -> RewardModel:
        """Load a reward model from a folder or by a Hub name. Only safetensors are read, and no code of the model runs.

        Raises:
            ValueError: it cannot be loaded, or lacks weights, as a language model lacks those of the reward.
        """
        try:
            model, report = AutoModelForSequenceClassification.from_pretrained(
                path, num_labels=1, use_safetensors=True, trust_remote_code=False, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"reward {path!r}: cannot load a reward model ({first_line(error)})") from error
        if report["missing_keys"]:
            missing = sorted(report["missing_keys"])[0]
            raise ValueError(
                f"reward {path!r} is no reward model: its weights lack {missing!r}; train one, or name one"
            )
        return cls.of(model, tokenizer, device)

    @classmethod
    def of(cls, model: nn.Module, tokenizer: Any = None, device: Any = None) -> RewardModel:
        """Wrap a model that is loaded already. Raise ValueError if it has not one label, or no tokenizer is found."""
        config: Any = getattr(model, "config", None)
        name = getattr(config, "_name_or_path", "") or type(model).__name__
        if getattr(config, "num_labels", None) != 1:
            labels = getattr(config, "num_labels", None)
            raise ValueError(f"reward {name!r} has {labels} labels; give a sequence classifier with num_labels=1")
        if (bad := first_not_finite(model.named_parameters())) is not None:
            raise ValueError(f"reward {name!r}: its weight {bad!r} holds NaN or infinity; give another model")
        if tokenizer is None:
            try:
                tokenizer = AutoTokenizer.from_pretrained(config._name_or_path, trust_remote_code=False)
            except (OSError, ValueError) as error:
                remedy = "give reward_processing_classes"
                raise ValueError(
                    f"reward {name!r} has no tokenizer beside it ({first_line(error)}); {remedy}"
                ) from error
        return cls(model if device is None else model.to(device), tokenizer)

    @torch.inference_mode()
    def __call__(
        self,
        prompts: Sequence[str | Sequence[Mapping[str, str]]],
        completions: Sequence[Any],
        visible_text: Sequence[str] | None = None,
        **_: Any,
    ) -> list[float]:
        """Return the N rewards. Arguments as of every reward function."""
        texts = [
            self.text(prompt, completion if visible_text is None else visible_text[i])
            for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]
        rewards: list[float] = []
        device = next(self.model.parameters()).device
        for start in range(0, len(texts), BATCH):
            inputs = self.tokenizer(
                texts[start : start + BATCH],
                return_tensors="pt",
                padding=True,
                padding_side="right",
                add_special_tokens=False,
            ).to(device)
            rewards += self.model(**inputs).logits[:, 0].float().tolist()
        return rewards

    def text(self, prompt: str | Sequence[Mapping[str, str]], completion: Any) -> str:
        """Return prompt and response as the model reads them: a chat in the template of its own tokenizer."""
        if isinstance(prompt, str):
            return prompt + (completion if isinstance(completion, str) else completion[-1]["content"])
        reply = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else list(completion)
        return str(self.tokenizer.apply_chat_template([*prompt, *reply], tokenize=False))
