"""CPU kernels in C and the library that holds them; used by the front functions of kernels/."""
