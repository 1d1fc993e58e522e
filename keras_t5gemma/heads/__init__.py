"""Classifiers and embedders on top of the stacks.

any_backbone      What keras-hub compares a preset's backbone with, to find a class that takes several kinds
classifier        What the classifiers of texts and of words have in common
labelled_data     `fit`, `evaluate` and `predict` of classifiers on all data that `keras.Model` accepts
loading           Classifiers from presets: the stacks from any T5Gemma, the head from a classifier's folder or new
saved_options     The options of a preprocessor that were saved with a checkpoint
shifted_inputs    What the decoder reads if a head is on it: the text, shifted
targets           Labels of classifiers: ids or names to arrays, with every value checked
text_classifier   Classes of texts, or numbers, from the last token or the mean
text_embedder     Texts as vectors, trained on pairs of queries and documents
text_inputs       Texts and pairs of texts to the ids that a classifier reads
token_classifier  A class for each word of a text
word_inputs       Words and their labels to pieces
"""
