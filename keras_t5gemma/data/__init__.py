"""Training data: objectives, pipelines and sources, in numpy and Grain, without Keras.

objectives/  Token ids to examples: UL2, PrefixLM, span corruption, mixtures
pipelines/   Texts to batches
sources/     Texts of files, Hugging Face datasets and iterables
"""
