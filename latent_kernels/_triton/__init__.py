"""Triton kernels. Imported only when one is about to run, so that the package works without Triton."""
