"""What speaks to the driver and to Triton's launcher: NVML, compiled kernels, launches, scratch memory."""
