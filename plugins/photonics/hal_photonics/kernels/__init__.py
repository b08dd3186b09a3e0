"""What runs on the device: attention, and the matrix products beside it."""
