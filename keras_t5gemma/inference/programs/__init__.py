"""Compiled and recorded programs.

compiled        A function of tensors as one program, compiled if the backend compiles
recorded_torch  A decoding step on PyTorch
"""
