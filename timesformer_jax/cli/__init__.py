"""The command line: `timesformer <command>`."""

import os
import sys

# In a file of the output a progress bar is a line a minute; tqdm reads this when it is imported.
if not sys.stderr.isatty():
    for option in ("DELAY", "MININTERVAL", "MAXINTERVAL"):
        os.environ.setdefault(f"TQDM_{option}", "60")
