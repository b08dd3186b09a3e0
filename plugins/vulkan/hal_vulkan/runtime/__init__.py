"""What speaks to the Vulkan driver, and to CUDA where it shares a card."""
