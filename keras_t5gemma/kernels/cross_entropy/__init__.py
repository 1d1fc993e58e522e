"""The cross-entropy of tokens over a large vocabulary, and its gradients, without storing all logits.

token_loss     the loss of one token's logits, and its gradient
chunks         cuts tokens into chunks, so that only one chunk's logits exist at a time
reference      the loop over chunks in `keras.ops`
jax            the same loop on each of several devices
tensorflow     TensorFlow's products, and XLA for the operations between them
torch          in place: a buffer of logits becomes their gradients
"""

PACKAGE = __name__
