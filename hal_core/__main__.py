"""`python -m hal_core` is the `hal` command, where hal-cli is installed."""

import sys

try:
    from hal_cli import main
except ModuleNotFoundError as error:
    if error.name != "hal_cli":
        raise
    sys.exit("the hal command is not installed: pip install 'hal-core[cli]'")

sys.exit(main())
