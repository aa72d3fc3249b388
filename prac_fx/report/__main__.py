"""`python -m prac_fx.report`."""

import sys

from prac_fx.report.cli import main

sys.exit(main())
