"""Shaders, and what records their dispatches."""
