"""``python -m harness``."""

import sys

try:
    from harness.cli import main

    status = main()
except KeyboardInterrupt:  # while all that is imported
    status = 130
sys.exit(status)
