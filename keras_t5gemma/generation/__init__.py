"""Decoding: the loop over one cached step, and its samplers."""
