"""What plugins build on: sessions, a pooled memory manager, a dense tiling, masks and merging, shared kernel specs."""
