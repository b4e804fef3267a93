"""metrics.jsonl: upstream's own numbers of each step, before it rounds them for its log.

``training_log`` and ``num_floating_point_operations`` in megatron/training/training.py are wrapped.
Nothing is measured or synchronised a second time: a step's time is what upstream's interval timer
returned. FLOPs are upstream's count, and the share of it that is computed: upstream counts frozen
weights as if they were trained. Only phases have timers of their own; see ``phases``.
"""

import math
import time

from harness.entry.phases import PhaseClock, wrap_phases
from harness.entry.report import RankReport
from harness.experiment.experiment import Experiment
from harness.predict.flops import share_of_upstreams
from harness.run.directory import RunDir
from harness.run.schema import StepMetrics

LOSS = "lm loss"


class StepClock:
    """Records the answers of upstream's interval timer to ``training_log``, as time per step.

    After the first step upstream reads the timer without resetting it, so that its second answer
    covers two steps (``training_log`` in megatron/training/training.py); here each step gets its
    own time. With ``--log-interval`` above 1 that is the mean since the last logged step.
    """

    def __init__(self) -> None:
        self.answer_s: float | None = None
        self._timer = None
        self._not_reset_s = 0.0
        self._steps = 0

    def listen(self, timer) -> None:
        """Count a step, and record the answers of ``timer`` from now on."""
        self._steps += 1
        self.answer_s = None
        if timer is self._timer:
            return
        self._timer, ask = timer, timer.elapsed

        def elapsed(reset: bool = True, barrier: bool = False) -> float:
            answer_s = ask(reset=reset, barrier=barrier)
            self.answer_s = (answer_s - self._not_reset_s) / max(self._steps, 1)
            self._not_reset_s = 0.0 if reset else answer_s
            self._steps = 0
            return answer_s

        timer.elapsed = elapsed


def install(report: RankReport) -> None:
    """Write a line for every step that upstream logs; update every rank's report."""
    from megatron.training import training

    log, count = training.training_log, training.num_floating_point_operations
    clock, phases = StepClock(), PhaseClock()
    wrap_phases(training, phases.around, phases.begin_step)
    report.phase_medians_ms = phases.medians_ms
    experiment = _experiment(report.run_dir)
    flops, share = 0.0, 1.0
    lines = report.run_dir.metrics.open("a", buffering=1) if report.is_last else None

    def counted(*args, **kwargs):
        nonlocal flops, share
        flops = count(*args, **kwargs)
        packed = (
            kwargs.get(name)
            for name in ("total_real_tokens_in_batch", "seqlen_squared_sum_in_batch")
        )
        share = share_of_upstreams(experiment, *packed) if experiment else 1.0
        return flops

    def training_log(*given, **kwargs):
        # the parameters are upstream's; later ones are passed through
        losses, _, learning_rate, step, loss_scale, _, skipped, grad_norm, *_ = given
        clock.listen(training.get_timers()("interval-time"))
        result = log(*given, **kwargs)
        step_s = clock.answer_s
        phases_ms = phases.read_ms() if step_s else {}
        report.after_step(step)
        if lines and step_s:
            args = training.get_args()
            loss = losses[LOSS].item()
            samples = (
                args.micro_batch_size * args.data_parallel_size * training.get_num_microbatches()
            )
            line = StepMetrics(
                step=step,
                loss=loss,
                grad_norm=None if grad_norm is None else float(grad_norm),
                step_ms=step_s * 1e3,
                forward_backward_ms=phases_ms.get("forward_backward"),
                optimizer_ms=phases_ms.get("optimizer"),
                tflops=share * flops / step_s / 1e12 / args.world_size,
                upstream_tflops=flops / step_s / 1e12 / args.world_size if experiment else None,
                tokens_per_s=samples * args.seq_length / step_s,
                learning_rate=learning_rate,
                loss_scale=float(loss_scale),
                skipped=int(skipped),
                nan=int(not math.isfinite(loss)),
                time=time.time(),
            )
            lines.write(line.model_dump_json() + "\n")
            for receive in report.on_metrics:
                receive(line)
        return result

    training.num_floating_point_operations = counted
    training.training_log = training_log


def _experiment(run: RunDir) -> Experiment | None:
    """The experiment that runs; None where upstream's script was started by hand."""
    try:
        return run.read_experiment()
    except ValueError:
        return None
