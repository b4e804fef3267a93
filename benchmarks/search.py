"""Layouts judged in a second by the search, and one by one.

    .venv/bin/python benchmarks/search.py > benchmarks/search.json

Both make the legal layouts of Llama 3 70B on 64 H100s and predict memory and step time: the search
of all at once, the other way for SAMPLE of them. Seconds are of one core, which other work on the
machine does not lengthen much; the ratio says more than either.
"""

import json
import time

from harness.experiment.hardware import find_card
from harness.experiment.unlisted import experiment_from
from harness.predict.calibrations import machine_of
from harness.predict.memory import predict
from harness.search.estimates import sizes, steps_ms
from harness.search.layouts import Search

SAMPLE = 300


def main() -> None:
    card = find_card("h100-80gb")
    search = Search(experiment_from("llama3-70b", {"GBS": "128"}), 64, card, machine_of(card))
    begun = time.process_time()
    table = search.table()
    sizes(table), steps_ms(table, search.machine.speed(nodes=search.nodes))
    at_once = len(table) / (time.process_time() - begun)
    begun = time.process_time()
    for row in range(0, len(table), len(table) // SAMPLE):
        experiment = search.laid_out(table, row)
        predict(experiment), search.machine.predict(experiment)
    one_by_one = len(range(0, len(table), len(table) // SAMPLE)) / (time.process_time() - begun)
    found = {
        "layouts": len(table),
        "layouts_per_second": round(at_once),
        "one_by_one_per_second": round(one_by_one),
        "ratio": round(at_once / one_by_one, 1),
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
