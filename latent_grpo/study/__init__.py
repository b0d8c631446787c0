"""`latent-grpo compare`: methods and ablations over several seeds."""
