"""Everything that a plugin may import from the core: the public names of `hal_core`, and those of its own below.

A name is imported when it is first used (PEP 562): a plugin's hook module loads neither torch nor a driver.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import _WHERE as _PUBLIC

if TYPE_CHECKING:
    from . import *  # noqa: F403
    from .access import AccessPolicy as AccessPolicy
    from .calibration import (
        calibrate as calibrate,
        load_calibration as load_calibration,
        write_whole as write_whole,
    )
    from .capability import listing as listing
    from .frontend.execution import moved_to as moved_to
    from .frontend.validation import check_tables as check_tables
    from .options import merged_policy as merged_policy, meter_var as meter_var
    from .plans import visible_keys as visible_keys
    from .plugins import LoadFailure as LoadFailure
    from .protocols import Autograd as Autograd, Progress as Progress
    from .registry import (
        find_devices as find_devices,
        open_session as open_session,
        refresh as refresh,
        registry as registry,
    )
    from .request import DTYPE_BYTES as DTYPE_BYTES
    from .selection import decide as decide, plan_text as plan_text, tiling_limits as tiling_limits
    from .testing.bench_setup import BenchSetup as BenchSetup, Call as Call, Ceilings as Ceilings
    from .toolkit.memory import pooled_size as pooled_size
    from .toolkit.session import checked_buffer as checked_buffer

#: Names by the module that holds them; every other one is hal_core's.
_NAMES = {
    "access": "AccessPolicy",
    "calibration": "calibrate load_calibration write_whole",
    "capability": "listing",
    "frontend.execution": "moved_to",
    "frontend.validation": "check_tables",
    "options": "merged_policy meter_var",
    "plans": "visible_keys",
    "plugins": "LoadFailure",
    "protocols": "Autograd Progress",
    "registry": "find_devices open_session refresh registry",
    "request": "DTYPE_BYTES",
    "selection": "decide plan_text tiling_limits",
    "testing.bench_setup": "BenchSetup Call Ceilings",
    "toolkit.memory": "pooled_size",
    "toolkit.session": "checked_buffer",
}
_WHERE = dict.fromkeys(_PUBLIC, ".") | {name: f".{place}" for place, own in _NAMES.items() for name in own.split()}
__all__ = sorted(_WHERE)
__dir__ = __all__.copy  # for help() and completion


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(_WHERE[name], __package__), name)
    return found
