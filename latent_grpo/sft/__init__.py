"""Latent-SFT, the warm start (arXiv 2510.15522): tokens of a chain of thought become targets of latent steps.

Each `compression` consecutive chain tokens give one latent target, the uniform distribution over them. Its input is the
mixture of their embeddings, perturbed by Gumbel noise if asked, as sampling will perturb it. Its loss is
KL(target || model). The end marker, the answer and EOS have the cross-entropy loss. The loss of an update is the mean
over the response elements of its examples.
"""

from latent_grpo.sft.examples import Example, SFTBatch, build_example, build_examples, collate
from latent_grpo.sft.inputs import gumbel_noise, input_mixtures
from latent_grpo.sft.loss import batch_loss, target_loss
from latent_grpo.sft.trainer import LatentSFTTrainer, gold_chain_accuracy

__all__ = [
    "Example",
    "LatentSFTTrainer",
    "SFTBatch",
    "batch_loss",
    "build_example",
    "build_examples",
    "collate",
    "gold_chain_accuracy",
    "gumbel_noise",
    "input_mixtures",
    "target_loss",
]
