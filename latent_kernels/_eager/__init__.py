"""Eager PyTorch implementations that never sort the vocabulary and never hold [N, V]."""
