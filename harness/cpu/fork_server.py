"""Imported by multiprocessing's fork server, so that checkpoint writers have the stand-in too."""

from harness.cpu import cuda

cuda.install()
