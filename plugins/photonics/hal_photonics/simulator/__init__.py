"""The values of a simulated photonic chip: number format, errors, noise, drift, and its states by temperature."""
