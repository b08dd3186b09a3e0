"""A model's layers on a photonic device: converting, gains, outliers, layers that stay digital, gradients."""
