"""Run under torchrun: trains by the harness's own script, though upstream's is there."""

from harness.entry import rank

rank.run(own_script=True)
