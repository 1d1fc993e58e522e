"""Keras's formats: presets and models of keras-hub, and presets of this package.

layouts  The layouts of tensors in Keras models: keras-hub's Gemma 2 and T5Gemma, and ours. Needs no Keras
models   keras-hub's Gemma 2 and T5Gemma models in memory, read as if they were Hugging Face checkpoints
presets  Keras presets on disk, read as if they were Hugging Face checkpoints. Needs no Keras
"""
