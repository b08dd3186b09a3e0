"""The version of every distribution in this repository.

Each pyproject.toml reads `__version__` from this file while it is built (a distribution's folder holds a symbolic link
to it), so this line is the only one that changes for a release, beside the `~=` ranges between distributions.
"""

__version__ = "0.2.0"
