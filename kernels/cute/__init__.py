"""CuTe DSL versions of kernels/ for Hopper, written in Python with `nvidia-cutlass-dsl`. Compiled offline; not run on hardware.

Nothing chooses them yet: benchmarks/h200.py measures them beside the others, after checking their results, where the package is.
"""
