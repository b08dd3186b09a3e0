"""`python -m hal_cli` is the `hal` command."""

import sys

from .main import main

sys.exit(main())
