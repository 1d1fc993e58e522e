"""The command line `keras-t5gemma`, without its being installed."""

from keras_t5gemma.cli import app

app()
