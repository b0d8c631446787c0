"""The warm start (arXiv 2510.15522): tokens of a chain of thought become targets of latent steps.

With `targets="uniform"`, each `compression` consecutive chain tokens give one latent target, the uniform distribution
over them. It is a short cut that needs no other model. Its input is the mixture of their embeddings, perturbed by
Gumbel noise if asked, as sampling will perturb it. Its loss is KL(target || model). The end marker, the answer and EOS
have the cross-entropy loss. The loss of an update is the mean over the response elements of its examples.

With `targets="soft_labels"`, it is the second stage of Latent-SFT. The targets are the soft labels that an encoder has
made (`encode.py`, the first stage). Noise perturbs targets and inputs alike. The loss of an update is the mean
cross-entropy of its text tokens plus the mean over its rows of KL(soft label || model), averaged over a row's steps.
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
