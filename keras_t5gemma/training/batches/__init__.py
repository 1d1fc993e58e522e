"""The data of `fit`, `evaluate` and `predict`, from any form to arrays.

answers          Checks and pads batches with several answers per prompt, for an `AnswerLoss`
arrays           Converts a batch of token ids, in any form that users and libraries write, to the model's arrays
fitting          `fit`, `evaluate` and `predict` on all data that `keras.Model` accepts, texts or token ids
graph            Batches in a traced `tf.data` pipeline: the same numpy code as elsewhere, as one operation of the graph
pairs            Pairs of texts, queries and documents, to arrays: the data that embedders are trained with
rows             Rows in memory: in batches, in another order each epoch, and split for validation
sources          The data of `fit`, `evaluate` and `predict` as a dataset of batches that Keras reads on every backend
stream_callback  `StreamCallback`: tells streams when a run begins, and warns if an epoch was shorter than requested
streams          An iterable of batches as a dataset that Keras reads: each batch once, even if Keras looks ahead
"""
