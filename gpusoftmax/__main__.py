"""python -m gpusoftmax: the command line."""

import sys

from gpusoftmax.cli import main

sys.exit(main())
