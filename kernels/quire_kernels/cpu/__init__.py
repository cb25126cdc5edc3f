"""The CPU path of every op, in vectorised torch: a row's bits depend on nothing but that row.

Knows tensors only. The rules that make rows independent are in this package's README.md;
`invariance.py` proves them at start.
"""
