"""`python -m hal_core` is the `hal` command, where hal-cli is installed."""

import sys

try:
    from hal_cli.main import main
except ModuleNotFoundError as error:
    if error.name not in ("hal_cli", "hal_cli.main"):
        raise
    sys.exit("the hal command is not installed: pip install 'hal-core[cli]'")

sys.exit(main())
