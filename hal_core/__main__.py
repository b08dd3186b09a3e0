"""`python -m hal_core` is `hal`."""

import sys

from .cli import main

sys.exit(main())
