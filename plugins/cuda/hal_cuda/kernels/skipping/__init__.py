"""Attention that passes over tiles of keys whose weights are negligible, where the caller asks for it."""
