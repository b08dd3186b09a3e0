"""The tracing API's tensors, their operators, and the graph that operators are recorded in."""

from . import operators as operators  # registers the operators behind Tensor's methods
