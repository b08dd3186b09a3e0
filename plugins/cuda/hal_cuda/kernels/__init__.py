"""The device's own kernels and their launches. Importing one imports Triton; nothing is imported before it is needed."""
