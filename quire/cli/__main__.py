"""`python -m quire.cli`: what the console script does, for child processes."""

import sys

from quire.cli import main

sys.exit(main())
