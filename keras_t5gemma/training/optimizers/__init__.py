"""Optimizers, their learning rates, and training in bfloat16.

adafactor            Adafactor, with one row and one column of second moments per matrix, for bfloat16 weights too
adamw                AdamW in one pass over the weights on every backend
adamw_tensorflow     AdamW's step on TensorFlow: one function per weight, compiled by XLA
adamw_torch          AdamW's step on PyTorch: its fused kernel
checks               Checks that an optimizer can move the weights of a model
factory              The optimizer of an adaptation run: schedule, clipping and weight decay as in the papers
indexed_slices       TensorFlow's gradients of embedding lookups, `tf.IndexedSlices`: rows of a table
learning_rates       Learning rates: one recommendation per optimizer and width, a schedule
low_precision        Training of weights stored in bfloat16, with float32 everywhere else
muon                 Muon, for bfloat16 weights too
stochastic_rounding  Stochastic rounding of float32 to bfloat16: up or down at random, right on average
weight_decay         Saves the weights that an optimizer does not decay in its config
"""
