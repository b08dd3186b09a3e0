"""The Stillwater KPU as a simulated device of hal_core. This module holds the hooks and names alone."""
