"""`python -m planner.cli` is `vramplan`."""

import sys

from planner.cli import main

sys.exit(main())
