"""CUDA C++ kernels beside attention, compiled at first use by NVRTC through CuPy."""
