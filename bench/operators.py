"""The benchmarks by the name of their operator."""

from bench.fused_policy_loss import FUSED_POLICY_LOSS
from bench.group_advantages import GROUP_ADVANTAGES
from bench.latent_logprob import LATENT_LOGPROB
from bench.latent_step import LATENT_STEP
from bench.latent_step_from_logits import LATENT_STEP_FROM_LOGITS
from bench.mix_embeddings import MIX_EMBEDDINGS
from bench.policy_loss import POLICY_LOSS
from bench.project_with_noise import PROJECT_WITH_NOISE
from bench.rollout import ROLLOUT
from bench.rollout_schedule import ROLLOUT_PREFIX, ROLLOUT_RAGGED
from bench.train_step import TRAIN_STEP

OPERATORS = {
    operator.name: operator
    for operator in (
        LATENT_STEP,
        LATENT_STEP_FROM_LOGITS,
        MIX_EMBEDDINGS,
        LATENT_LOGPROB,
        FUSED_POLICY_LOSS,
        POLICY_LOSS,
        GROUP_ADVANTAGES,
        PROJECT_WITH_NOISE,
        ROLLOUT,
        ROLLOUT_RAGGED,
        ROLLOUT_PREFIX,
        TRAIN_STEP,
    )
}
