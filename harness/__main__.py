"""``python -m harness``."""

import sys

try:
    from harness import screen
    from harness.cli import main

    screen.guard()
    status = main()
except KeyboardInterrupt:  # while all that is imported
    status = 130
sys.exit(status)
