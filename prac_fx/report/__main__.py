"""`python -m prac_fx.report`."""

import gc
import os
import sys

# This is set before torch is imported. Its profiler tells each start and stop on standard error.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

from prac_fx.report.cli import INTERRUPTED, main

# Objects between two collections. Tracing makes millions that live on. At Python's 700 a tenth of
# the time goes into looking through all of them again and again.
gc.set_threshold(100_000, *gc.get_threshold()[1:])
code = main()
if code == INTERRUPTED:
    # taking apart what an analysis has built takes seconds, and whoever interrupts wants none
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
sys.exit(code)
