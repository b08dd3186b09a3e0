"""The driver protocol: what the device code asks of a chip, simulated or not."""
