"""The report of a comparison: a page that needs no network, and the same numbers as CSV and JSON beside it."""

from .files import check_target, write
from .page import Beside, render

__all__ = ["Beside", "check_target", "render", "write"]
