"""Classifiers of texts and of tokens, and embedders, on top of the stacks."""
