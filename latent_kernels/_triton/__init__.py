"""Triton kernels. They are imported only when a kernel is about to run, so the package works without Triton."""
