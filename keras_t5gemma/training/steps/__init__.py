"""The steps of `fit` and `evaluate`, this package's own, one file per backend.

model         What a model gets its steps by
accumulation  How a batch is cut into parts, and how their losses and gradients add up
comparison    Parts of a batch whose rows the loss compares with each other
common        What the backends share: loss, logs, gradients as an optimizer takes them
jax           Functions of state and batch; parts are one loop of XLA's
tensorflow    Parts are one loop of the graph's
torch         One part after another
"""
