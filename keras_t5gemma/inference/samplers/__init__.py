"""Samplers that keras-hub lacks, and the names of all samplers that `compile` accepts.

beam         Beam search that gives each example the same result, whatever batch it is in
top_k_top_p  Random choice of the next token among the likeliest, and seeds for a single call
"""

SAMPLERS = ("greedy", "beam", "top_k", "top_p", "random", "contrastive")
