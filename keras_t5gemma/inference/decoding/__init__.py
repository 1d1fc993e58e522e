"""The decoding loop.

chunks    Decoding in chunks of tokens, for streams and for stop strings
loop      The decoding loop over one cached step
programs  The programs of a model that decode in chunks, and its decoding step
stopping  The end of generated sequences: stop ids, and the mask of the positions up to them
"""
