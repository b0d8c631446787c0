"""The operators as the paper writes them, in plain PyTorch. Read these two pages to see what the operators compute.

`latent_step` is about sampling, `loss` about training. The eager and the Triton operators share formulas and constants
of these pages. So the pages alone cannot judge them: the tests have formulas of their own, in tests/support/oracle.py.
"""
