"""What `fit()` needs beyond Keras: callbacks."""
