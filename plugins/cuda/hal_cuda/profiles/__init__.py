"""Measured figures of one GPU, by which estimates and paths go where `hal calibrate` was not run."""
