"""The decoder's parts: what a layer is told about the batch, rotary angles, linear layers, the
device's kernels.
"""
