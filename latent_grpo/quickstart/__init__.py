"""`latent-grpo quickstart`: the whole job on a toy task that is made on the spot."""
