"""CuTe DSL versions of kernels/ for Hopper, written in Python with `nvidia-cutlass-dsl`. Compiled offline; not run on hardware.

`--moe-runner-backend cutlass` and the table in kernels/grouped_backends.py choose them; benchmarks/h200.py measures them.
"""
