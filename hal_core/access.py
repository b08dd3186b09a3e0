"""Who may use what: a policy file read before any plugin is discovered. Without a file everything is allowed.

The file is named by HAL_ACCESS, or is /etc/hal/access.toml. It holds a table for callers named by `hal_core.caller`,
and one for everybody else; patterns are shell-style. What is not listed is denied, and so is everything where the file
is damaged:

    [default]
    devices = ["cpu:*"]
    [callers.trainer]
    devices = ["*"]
    kernels = ["*"]
    register = true
"""

import os
import stat
from contextvars import ContextVar
from fnmatch import fnmatchcase
from typing import Any

from .errors import AccessDeniedError

DEFAULT_FILE = "/etc/hal/access.toml"
caller_var: ContextVar[str] = ContextVar("hal_caller", default="")  # set by `hal_core.caller`


def current_caller() -> str:
    """The name given by `caller`, "" for none."""
    return caller_var.get()


class AccessPolicy:
    """The rules of one file; `problem` is "" or says why everything is denied."""

    def __init__(self, path: str | None) -> None:
        self.path, self.problem, self.rules = path, "", dict[str, Any]()
        if path is None:
            return
        import tomllib

        try:
            with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
                facts = os.fstat(file.fileno())
                if not stat.S_ISREG(facts.st_mode) or facts.st_mode & 0o022:
                    raise ValueError("it is not a regular file that only its owner may write")
                self.rules = tomllib.load(file)
            tables = [self.rules.get("default", {}), *self.rules.get("callers", {}).values()]
            for key, allowed in [pair for table in tables for pair in table.items()]:
                patterns = isinstance(allowed, list) and all(isinstance(pattern, str) for pattern in allowed)
                if not (type(allowed) is bool if key == "register" else key in ("devices", "kernels") and patterns):
                    raise ValueError(
                        f"{key} = {allowed!r}: devices and kernels are lists of patterns, register a boolean"
                    )
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            self.problem = f"the access policy {path} cannot be used ({error}), so everything is denied"
            self.rules = {}

    def why_not(self, kind: str, name: str) -> str:
        """ "" where the current caller may use `name` ("devices", "kernels") or register ("register"); else one
        sentence.
        """
        if self.path is None:
            return ""
        who = caller_var.get()
        allowed = self.rules.get("callers", {}).get(who, self.rules.get("default", {})).get(kind, ())
        if not self.problem and (allowed is True or (allowed and any(fnmatchcase(name, p) for p in allowed))):
            return ""
        return self.problem or f"{self.path} does not allow {who or 'an unnamed caller'} {kind} {name}"

    def demand(self, kind: str, name: str) -> None:
        """Raise AccessDeniedError where the current caller may not."""
        if problem := self.why_not(kind, name):
            raise AccessDeniedError(f"{problem}: ask whoever keeps that file. Nothing was run.")


def read_policy() -> AccessPolicy:
    """The policy that HAL_ACCESS names, else the machine's; one that allows everything where there is neither."""
    return AccessPolicy(os.environ.get("HAL_ACCESS") or (DEFAULT_FILE if os.path.lexists(DEFAULT_FILE) else None))
