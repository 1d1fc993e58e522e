"""The training step of a batch that runs in parts, one file per backend.

accumulation  How a batch is cut into parts, and how their losses and gradients add up
jax           One loop of XLA's
tensorflow    One loop of the graph's
torch         One part after another
"""
