"""The CPU's attention kernels, written in torch's operators."""
