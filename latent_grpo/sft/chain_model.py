"""Encoder and decoder of the first stage of Latent-SFT as one module, and its loss (arXiv 2510.15522)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from latent_grpo.config import EncodeConfig
from latent_grpo.decoding_proof import check_decoding
from latent_grpo.model import (
    body,
    embed,
    embedding_scale,
    embedding_table,
    freeze_head,
    freeze_table,
    head_of,
    lm_head,
)
from latent_grpo.parallel.fsdp import assign
from latent_grpo.sft.loss import target_loss
from latent_grpo.sft.pieces import ChainBatch
from latent_grpo.update.activation_checkpointing import recomputed
from latent_grpo.update.lora import add_adapters

TRAINED_FILE = "trained.safetensors"  # of a checkpoint


class ChainModel(nn.Module):
    """An encoder of chains of thought and a decoder that reads its latent steps.

    The compress token is a parameter beside the encoder's embedding table, which keeps its size.

    Args:
        encoder, decoder: causal LMs of one vocabulary and width. The encoder's LM head is not used.
        compress_token: embedding [D] of the compress token. None: the mean of what the encoder is fed for a token.
        trained: the parts to train, "encoder" and "decoder". The others are frozen.
        args: the options of adapters and of frozen tables.
    """

    def __init__(
        self, encoder: Any, decoder: Any, compress_token: Tensor | None, trained: tuple[str, ...], args: EncodeConfig
    ) -> None:
        super().__init__()
        for model in (encoder, decoder):
            check_decoding(model)
        table = embedding_table(encoder).detach()
        self.encoder, self.decoder, self.trained_parts, self.args = encoder, decoder, trained, args
        self.compress_token = nn.Parameter(
            table.float().mean(0).to(table) * embedding_scale(encoder) if compress_token is None else compress_token
        )
        for part in ("encoder", "decoder"):
            set_trained(getattr(self, part), part in trained, args)
        # The states of the encoder are used, and never its logits.
        if lm_head(encoder) is not embedding_table(encoder):
            freeze_head(encoder)
        self.compress_token.requires_grad_("encoder" in trained)
        self.trained_names = [name for name, p in self.named_parameters() if p.requires_grad]

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.compress_token.device

    def train(self, mode: bool = True) -> ChainModel:
        """Set the mode of the trained parts. Frozen parts stay in evaluation mode, without dropout."""
        self.encoder.train(mode and "encoder" in self.trained_parts)
        self.decoder.train(mode and "decoder" in self.trained_parts)
        return self

    def soft_labels(self, batch: ChainBatch) -> tuple[Tensor, Tensor]:
        """Return the soft labels of the N latent steps of a batch, row after row: probs [N, K] float32, ids [N, K].

        They are the softmax of the K highest of `state @ E.T`, with the encoder's state at the compress token behind
        each piece and the decoder's embedding table E, which has no gradient here. What the decoder does with the
        products of its own head, it does with these: it scales and caps them. A bias belongs to that head alone.
        """
        embeds = embed(self.encoder, batch.encoder_ids)
        embeds = torch.where(batch.cut.unsqueeze(-1), self.compress_token, embeds)
        places = torch.arange(embeds.shape[1], device=embeds.device).expand(embeds.shape[:2])
        with torch.set_grad_enabled(torch.is_grad_enabled() and "encoder" in self.trained_parts):
            state = body(self.encoder, embeds, additive(batch.encoder_mask, embeds), places)[batch.cut]
        table = embedding_table(self.decoder).detach()
        highest = F.linear(state.to(table.dtype), table).topk(self.args.label_size, dim=-1)
        return replace(head_of(self.decoder), bias=None).finish(highest.values).softmax(-1), highest.indices

    def decoded(self, batch: ChainBatch) -> Tensor:
        """Return the decoder's states [N, D] before the N targets of a batch, row after row; each predicts one."""
        probs, ids = self.soft_labels(batch)
        table, scale = embedding_table(self.decoder), embedding_scale(self.decoder)
        steps = (probs.unsqueeze(-1) * F.embedding(ids, table.detach()).float()).sum(1).to(table.dtype) * scale
        embeds = embed(self.decoder, batch.decoder_ids).masked_scatter(batch.latent.unsqueeze(-1), steps)
        hidden = body(self.decoder, embeds, additive(batch.decoder_mask, embeds), batch.decoder_positions)
        return hidden[:, :-1][batch.target[:, 1:]]

    def loss(self, batch: ChainBatch) -> Tensor:
        """Return the sum of the cross-entropies of a batch's chain tokens and text, 0-d float32."""
        with recomputed(self, self.args.gradient_checkpointing):
            hidden = self.decoded(batch)
        ids = batch.decoder_ids[batch.target].unsqueeze(-1)
        return target_loss(hidden, head_of(self.decoder), ids, torch.ones(ids.shape, device=ids.device))

    @torch.no_grad()
    def right(self, batch: ChainBatch) -> Tensor:
        """Return which positions [B, M] bool of a batch the decoder predicts from the tokens before them (argmax)."""
        head = head_of(self.decoder)
        predicted = torch.cat([head.trained_logits(h).argmax(-1) for h in self.decoded(batch).split(256)])
        right = torch.zeros_like(batch.target)
        right[batch.target] = predicted == batch.decoder_ids[batch.target]
        return right

    def write_files(self, folder: Path) -> None:
        """Write the trained parameters into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        parameters = dict(self.named_parameters())
        values = {name: parameters[name].detach().cpu().contiguous() for name in self.trained_names}
        save_file(values, folder / TRAINED_FILE, metadata={"format": "pt"})

    def read_files(self, folder: Path) -> None:
        """Read the trained parameters that `write_files` wrote. Collective: every rank must call it."""
        saved = load_file(folder / TRAINED_FILE)
        for name, parameter in self.named_parameters():
            if name in saved:
                assign(parameter, saved[name])


def set_trained(model: Any, trained: bool, args: EncodeConfig) -> None:
    """Freeze a model, or train it: its adapters, or all of it but for a frozen table."""
    model.requires_grad_(trained)
    if trained and args.use_peft:
        add_adapters(model, args, args.lora_dropout)
    elif trained and args.freeze_embeddings:
        freeze_table(model)


def additive(mask: Tensor, embeds: Tensor) -> Tensor:
    """Return a mask [B, 1, L, L] bool as numbers in the dtype of `embeds`, which are added to attention scores."""
    hidden = torch.finfo(embeds.dtype).min
    return torch.zeros(mask.shape, dtype=embeds.dtype, device=mask.device).masked_fill(~mask, hidden)
