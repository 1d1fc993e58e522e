"""The data of `fit`, `evaluate` and `predict`, from any form to arrays.

arrays   One batch of token ids, in the form that users and libraries write it, as the arrays that the model takes
fitting  `fit`, `evaluate` and `predict` on everything that `keras.Model` takes, texts or token ids
graph    Batches in a traced `tf.data` pipeline: the same numpy code as elsewhere, as one operation of the graph
rows     Rows in memory: in batches, in another order each epoch, and parted for validation
sources  The data given to `fit`, `evaluate` and `predict`
streams  An iterable of batches as a dataset that Keras reads: each batch once, even if Keras looks ahead
"""
