"""The Hopper forward under masks and block plans."""
