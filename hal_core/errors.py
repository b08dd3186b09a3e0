"""Every error this package raises on purpose. One sentence each: what was given, what is wanted, what to do."""


class HalError(Exception):
    """Base of all errors raised on purpose. The command line prints it and exits with 2."""


class ContractError(HalError, ValueError, RuntimeError):
    """Malformed input: a wrong rank, shape, dtype or value. No device could run it.

    Both a ValueError and a RuntimeError: torch raises RuntimeError for the same mistakes.
    """


def refuse(*checks: tuple[bool, str]) -> None:
    """Raise ContractError with the sentence of the first check, (what is wrong, sentence), that holds."""
    for wrong, sentence in checks:
        if wrong:
            raise ContractError(sentence)


class UnsupportedError(HalError, RuntimeError):
    """A well-formed request that no eligible device runs.

    Attributes:
        decision: the `hal_core.Decision` with every reason, or None where no device was consulted.
    """

    def __init__(self, message: str, decision: object = None) -> None:
        super().__init__(message)
        self.decision = decision


class UnknownBackendError(HalError, LookupError):
    """A backend name that no installed plugin offers."""


class DeviceUnavailableError(HalError, RuntimeError):
    """A backend is installed, but the device that was named is not present or cannot be used."""


class AccessDeniedError(HalError, PermissionError):
    """The access policy does not allow this caller the device, kernel or registration. Nothing was run."""


class MemoryLimitError(UnsupportedError, MemoryError):
    """A request would exceed the memory limit. Nothing was allocated.

    Attributes:
        requested, in_use, limit: bytes.
    """

    def __init__(
        self,
        device: str,
        requested: int,
        in_use: int,
        limit: int,
        decision: object = None,
        *,
        limited_by: str = "hal.configure(memory_limit=...)",
    ) -> None:
        super().__init__(
            f"{device} cannot allocate {requested:,} bytes: {in_use:,} in use of a limit of {limit:,}. Nothing was "
            f"allocated. Free buffers, call trim(), shorten the request, or raise {limited_by}.",
            decision,
        )
        self.requested, self.in_use, self.limit = requested, in_use, limit


class PluginError(HalError, RuntimeError):
    """A plugin that cannot be loaded or breaks the plugin contract."""


class SelectionChangedError(HalError, RuntimeError):
    """Compiled code runs under another device selection than the one it was compiled for."""
