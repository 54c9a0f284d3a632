"""Tensor operations of the engine: tensors in, tensors out.

One operation per file. Nothing here knows ranks, collectives, configuration or models; every function accepts zero tokens.
"""
