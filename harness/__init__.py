"""Run, understand and tune Megatron-LM: the package behind the Makefile's targets."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "experiments" / "records"
