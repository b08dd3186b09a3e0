"""Attention forward for compute capability 8.0 and up, in Triton."""
