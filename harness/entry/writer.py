"""Imported by multiprocessing's fork server: the checkpoint writer that it forks dies with it, and
it with its rank."""

import os

from harness.system.orphans import end_with

end_with(os.getppid())
_server = os.getpid()
os.register_at_fork(after_in_child=lambda: end_with(_server))
