"""Keras's formats: presets and models of keras-hub, and presets of this package.

embedder_options  What a saved text embedder says of its pooling, in either format
layouts           The layouts of tensors in Keras models: keras-hub's Gemma 2 and T5Gemma, and ours. Needs no Keras
models            keras-hub's Gemma 2 and T5Gemma models in memory, read as if they were Hugging Face checkpoints
presets           Keras presets on disk, read as if they were Hugging Face checkpoints. Needs no Keras
"""
