"""The decoding loop.

chunks    Decoding in chunks of tokens, for streams
loop      The decoding loop over one cached step
stopping  Where a generated sequence ends
"""
