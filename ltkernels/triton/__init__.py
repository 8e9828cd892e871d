"""Triton kernels for CUDA, one file an operation. Imported at the first call with a CUDA tensor."""
