"""`python -m pyglobenc`: the command line."""

import sys

from pyglobenc.cli.main import main

sys.exit(main())
