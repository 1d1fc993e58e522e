"""Training data: objectives, pipelines and sources, in numpy and Grain, without Keras.

objectives/  UL2, PrefixLM, mixtures
pipelines/   texts to batches
sources/     files, Hugging Face datasets, iterables
"""
