"""The Triton versions of kernels/: host functions with the front functions' signatures, for tensors on a CUDA device.

Import these modules only where a tensor is on a device (or in Triton's interpreter): nothing else needs Triton installed.
"""
