"""Attention through OpenCL beside torch's scaled_dot_product_attention: python benchmarks/opencl_attention.py
[--record].

See vulkan_attention.py for what is timed.
"""

from __future__ import annotations

from vulkan_attention import main

if __name__ == "__main__":
    main("opencl")
