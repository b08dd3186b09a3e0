"""How long a device is waited for."""

#: Seconds after which a wait gives up.
TIMEOUT = 300.0
#: Seconds that work which should have ended is given, after a failure and before a session closes.
GRACE = 30.0
