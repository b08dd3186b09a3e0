"""Who may use what: a policy file read before any plugin is discovered. Without a file everything is allowed.

The file is the machine's /etc/hal/access.toml; where there is none, the one that HAL_ACCESS names. It holds a table for
callers named by `hal_core.caller`, and one for everybody else; patterns are shell-style. What is not listed is denied,
and so is everything where the file is damaged:

    plugins = ["cpu", "cuda", "telemetry"]      # which may load, as in HAL_PLUGINS; without the line all may
    required = ["telemetry"]                    # without these plugins everything is denied
    [default]
    devices = ["cpu:*"]
    memory = 1_000_000_000                      # bytes that a call may bring a device's memory to
    seconds = 0.5                               # that a call may take, by the device's estimate
    [callers.trainer]
    secret = "2bd8..."                          # SHA-256 of what hal.caller("trainer", secret) is given
    devices = ["*"]
    simulated = false                           # of these devices hardware alone
    kernels = ["*"]
    register = true

A table [audit] is left to the plugin that keeps an audit log.
"""

import os
import stat
import sys
from contextvars import ContextVar
from fnmatch import fnmatchcase
from typing import Any

from .errors import AccessDeniedError

DEFAULT_FILE = "/etc/hal/access.toml"
#: What a table may hold; numbers are positive.
KEYS = {
    "devices": (list,),
    "kernels": (list,),
    "register": (bool,),
    "simulated": (bool,),
    "memory": (int,),
    "seconds": (int, float),
    "secret": (str,),
}
_TOP = {"default": dict, "callers": dict, "audit": dict, "plugins": list, "required": list}
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
            given = [(KEYS.get(key, ()), key, rule) for table in tables for key, rule in table.items()]
            given += [((_TOP[key],) if key in _TOP else (), key, rule) for key, rule in self.rules.items()]
            for kinds, key, rule in given:
                texts = type(rule) is not list or all(isinstance(pattern, str) for pattern in rule)
                if type(rule) not in kinds or not texts or (type(rule) in (int, float) and not rule > 0):
                    raise ValueError(
                        f"{key} = {rule!r}: {', '.join(_TOP)} are known beside {', '.join(KEYS)} of a caller; devices, "
                        "kernels, plugins and required are lists of texts, register and simulated booleans, memory a "
                        "whole number of bytes, seconds a number, both above 0, secret a text"
                    )
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            self.problem = f"the access policy {path} cannot be used ({error}), so everything is denied"
            self.rules = {}

    def rule(self, key: str, caller: str | None = None) -> Any:
        """What the table of the current caller, or of another one, says under a key; None where it says nothing."""
        who = caller_var.get() if caller is None else caller
        return self.rules.get("callers", {}).get(who, self.rules.get("default", {})).get(key)

    def why_not(self, kind: str, name: str, simulated: bool = False, caller: str | None = None) -> str:
        """ "" where the current caller, or another one, may use `name` ("devices", "kernels") or register ("register");
        else one sentence. `simulated`: whether a device is not hardware.
        """
        if self.problem or self.path is None:
            return self.problem
        allowed, barred = self.rule(kind, caller) or (), simulated and self.rule("simulated", caller) is False
        if not barred and (allowed is True or any(fnmatchcase(name, pattern) for pattern in allowed)):
            return ""
        what = f"{kind} that are not hardware, such as {name}" if barred else f"{kind} {name}"
        return f"{self.path} does not allow {caller_var.get() or 'an unnamed caller'} {what}"

    def demand(self, kind: str, name: str, simulated: bool = False) -> None:
        """Raise AccessDeniedError where the current caller may not, and tell `sys.addaudithook`'s hooks."""
        if problem := self.why_not(kind, name, simulated):
            sys.audit("hal_core.access_denied", kind, name, caller_var.get())
            raise AccessDeniedError(f"{problem}: ask whoever keeps that file. Nothing was run.")

    def admit(self, caller: str, secret: str) -> None:
        """Raise AccessDeniedError where the policy holds the hash of another secret for a caller."""
        from hashlib import sha256

        wanted = self.rules.get("callers", {}).get(caller, {}).get("secret")
        if wanted is not None and sha256(secret.encode()).hexdigest() != wanted.lower():
            sys.audit("hal_core.access_denied", "callers", caller, caller_var.get())
            raise AccessDeniedError(
                f"{self.path} knows {caller} by a secret: pass it as hal.caller({caller!r}, secret)"
            )


def read_policy() -> AccessPolicy:
    """The machine's policy, which no environment replaces; else the one that HAL_ACCESS names, else none."""
    return AccessPolicy(DEFAULT_FILE if os.path.lexists(DEFAULT_FILE) else os.environ.get("HAL_ACCESS") or None)
