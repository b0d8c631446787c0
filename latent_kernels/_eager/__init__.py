"""Eager PyTorch implementations. The latent step sorts no large vocabulary; the losses hold only chunks of [N, V]."""
