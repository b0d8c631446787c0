"""`latent-grpo compare`: methods and ablations on one task, over several seeds."""
