"""``python -m harness``."""

import sys

try:
    from harness.cli import main
    from harness.system import screen

    screen.guard()
    status = main()
except KeyboardInterrupt:  # while all that is imported
    status = 130
sys.exit(status)
