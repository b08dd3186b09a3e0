"""Kernels beside attention: their checks, Triton versions, references, and what is built on them."""
