"""Decoding: the loop over one cached step, and its samplers."""

SAMPLERS = ("greedy", "beam", "top_k", "top_p", "random", "contrastive")  # the names that `compile` takes
