"""The device's own kernels. Importing one imports Triton; nothing here is imported before a session needs it."""
