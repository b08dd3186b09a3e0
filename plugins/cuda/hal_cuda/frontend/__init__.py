"""PyTorch's own attention calls on this package's kernels: see `hal_cuda.activate_sdpa` and `hal_cuda.varlen_attn`."""
