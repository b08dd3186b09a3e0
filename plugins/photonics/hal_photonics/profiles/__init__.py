"""Photonic devices as files: what a profile is (`profile`), its figures (`figures`), and the bundled example."""
