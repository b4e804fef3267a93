"""validation.jsonl: the loss of every evaluation; and the end of a run at a target loss.

``HARNESS_UNTIL`` is the loss on held-out data at which the run is done. All ranks then set
``train_iters`` to the current step, so that upstream saves, evaluates and exits as after any last
step.
"""

import os
import time

from harness.entry.metrics import LOSS
from harness.entry.report import RankReport
from harness.run.schema import Validation
from harness.upstreams.megatron_lm.environment import UNTIL_VARIABLE


def install(report: RankReport) -> None:
    """Write a line for every evaluation, and end the run at ``HARNESS_UNTIL`` if that is set."""
    from megatron.training import training
    from megatron.training.utils import print_rank_0

    evaluate, evaluate_and_print = training.evaluate, training.evaluate_and_print_results
    until = float(os.environ[UNTIL_VARIABLE]) if UNTIL_VARIABLE in os.environ else None
    split, step, held_out = "validation", 0, None
    evaluated: set[tuple[str, int]] = set()

    def evaluate_and_print_results(
        prefix, forward_step, iterator, model, iteration, *args, **kwargs
    ):
        nonlocal split, step, held_out
        split, step, held_out = "test" if "test set" in prefix else "validation", iteration, None
        if (split, step) in evaluated:
            # after the last step upstream evaluates again, on other batches: a second loss of the
            # same weights
            print_rank_0(f"> {prefix}: evaluated already")
            return None
        evaluated.add((split, step))
        result = evaluate_and_print(
            prefix, forward_step, iterator, model, iteration, *args, **kwargs
        )
        if (
            until is not None
            and split == "validation"
            and _on_any_rank(held_out is not None and held_out <= until)
        ):
            training.get_args().train_iters = iteration
        return result

    def evaluate_and_keep(*args, **kwargs):
        nonlocal held_out
        result = evaluate(*args, **kwargs)
        losses = result[0]
        if losses:
            held_out = losses[LOSS].item()
            if report.is_last:
                line = Validation(step=step, split=split, loss=held_out, time=time.time())
                with report.run_dir.validation.open("a") as lines:
                    lines.write(line.model_dump_json() + "\n")
        return result

    training.evaluate = evaluate_and_keep
    training.evaluate_and_print_results = evaluate_and_print_results


def _on_any_rank(here: bool) -> bool:
    """Whether ``here`` is true on any rank: only the last pipeline stage knows the loss."""
    import torch

    answer = torch.tensor([int(here)], device="cuda")
    torch.distributed.all_reduce(answer, op=torch.distributed.ReduceOp.MAX)
    return bool(answer.item())
