"""Device programs, and what launches them."""
