"""Imported by multiprocessing's fork server, which forks upstream's checkpoint writer.

The server ends with its rank, and the writer with the server. Without this, a rank killed by
SIGKILL leaves both running.
"""

import os

from harness.system.orphans import end_with

end_with(os.getppid())
_server = os.getpid()
os.register_at_fork(after_in_child=lambda: end_with(_server))
