"""Pure functions of tensors: attention over paged KV, norms, activation, sampling.

Knows nothing of models, requests or processes. Importing this package imports neither torch nor
triton; `quire_kernels.dispatch` loads a backend when an op is first called.
"""
