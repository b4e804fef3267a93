"""What torchrun starts, one process a rank: ``torchrun … -m harness.entry <upstream's arguments>``."""

from harness.entry import failures, rank

failures.die_with_parent()
rank.run()
