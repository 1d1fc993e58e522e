"""Samplers beside those of keras-hub, and the names of all that `compile` takes."""

SAMPLERS = ("greedy", "beam", "top_k", "top_p", "random", "contrastive")
