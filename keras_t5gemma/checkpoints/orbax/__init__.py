"""Flax's checkpoints in Orbax's format.

files       A folder in Orbax's format as tensorstores by parameter; only shapes and dtypes are read here
parameters  T5Gemma's Flax checkpoints (Orbax, from Kaggle), read as if they were Hugging Face checkpoints
"""
