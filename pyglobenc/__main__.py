"""`python -m pyglobenc`: the command line."""

import sys

from pyglobenc.cli import main

sys.exit(main())
