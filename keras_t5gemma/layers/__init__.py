"""The Keras layers of one block: masks, norm, feed-forward, attention."""
