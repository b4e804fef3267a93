"""Imported by multiprocessing's fork server: what it forks, upstream's checkpoint writers, has the
stand-in too."""

from harness.cpu import cuda

cuda.install()
