"""`python -m trl_r3.cli`, for launchers that start a module."""

import sys

from .command import main

sys.exit(main())
