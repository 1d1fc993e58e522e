"""The decoding loop.

chunks    Decoding in chunks of tokens, for streams
loop      The decoding loop over one cached step
stopping  The end of generated sequences: stop ids, and the mask of the positions up to them
"""
