"""Run under torchrun: trains by the harness's own script, though upstream's is there."""

from harness.entry import rank
from harness.machine.upstream import Upstream

rank.prepare()
rank.run(Upstream(None))
