"""`python -m hal_core` is the `hal` command, where hal-cli is installed."""

import sys
from importlib import import_module
from importlib.util import find_spec

if find_spec("hal_cli") is None:
    sys.exit("the hal command is not installed: pip install 'hal-core[cli]'")
sys.exit(import_module("hal_cli").main())
