"""Objectives: token ids in, examples out.

by_name          `objective`, which makes an objective by its name
example          `Example`, the output of an objective, and its conversion to model inputs
mixture          Several objectives in given proportions, as one objective
noise_masks      Noise masks: the places of corrupted spans in a sequence, and the inputs and targets of a mask
prefix_lm        PrefixLM: the encoder reads the first half of a text, the decoder continues it
span_corruption  Span corruption (T5, arXiv 1910.10683, section 3.3.4): holes in the inputs
ul2              UL2 (arXiv 2205.05131): several denoisers in one objective
"""
