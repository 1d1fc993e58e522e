"""The cross-entropy of tokens over a large vocabulary, and its gradients, without all the logits.

token_loss     the loss of one token's logits, and its gradient
chunks         tokens cut into chunks, a chunk's logits at a time
reference      the loop over chunks in `keras.ops`
jax            that loop on each of several devices
tensorflow     between products, all by XLA
torch          in place: a buffer of logits becomes their gradients
"""

PACKAGE = __name__
