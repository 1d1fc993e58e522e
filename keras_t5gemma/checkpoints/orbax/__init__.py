"""Flax's checkpoints in Orbax's format.

files       Opens a folder in Orbax's format: one tensorstore per parameter, of which shapes and dtypes are read
parameters  T5Gemma's Flax checkpoints (Orbax, from Kaggle), read as if they were Hugging Face checkpoints
"""
