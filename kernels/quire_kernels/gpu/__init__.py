"""Triton kernels and their launchers; the only modules that import triton.

They know tensors on one CUDA device. The contract of each op (shapes, effects) is in the module of
the same name one level up, beside its torch reference.
"""
