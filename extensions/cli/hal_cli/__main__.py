"""`python -m hal_cli` is the `hal` command."""

import sys

from .command_line import main

sys.exit(main())
