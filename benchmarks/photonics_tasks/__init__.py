"""The tasks of photonics_end_to_end: data, networks and training that need nothing but what is installed."""
