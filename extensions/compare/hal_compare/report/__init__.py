"""The report of a comparison: a page that needs no network, and the same numbers as CSV and JSON beside it."""

from .files import check_target, replace_whole, write
from .page import STYLE, Beside, render

__all__ = ["STYLE", "Beside", "check_target", "render", "replace_whole", "write"]
