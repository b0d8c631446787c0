"""`latent-grpo quickstart`: the whole pipeline on a toy task that is made on the spot."""
