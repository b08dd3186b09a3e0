"""The device's own kernels and their launches. Importing one imports Triton, so each is imported when it is needed."""
