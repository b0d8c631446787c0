"""The public operators: argument checks, choice of the implementation, gradients. Import them from `latent_kernels`."""
