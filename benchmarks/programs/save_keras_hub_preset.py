"""Saves keras-hub's T5Gemma of Small-Small size in bfloat16: `save_keras_hub_preset.py FOLDER`."""

import sys

from keras_hub_model import backbone

backbone("bfloat16").save_to_preset(sys.argv[1])
