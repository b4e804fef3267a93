"""How a run ended, from what it left: status, first error, its rank, and advice. No I/O."""

from __future__ import annotations

import math
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from harness.predict.capacity import levers
from harness.run.schema import RankError, Status, StepMetrics, Validation
from harness.system import yaml_files
from harness.system.files import MAKE_ROOM

if TYPE_CHECKING:
    from harness.experiment.experiment import Experiment

FAILURES = Path(__file__).with_name("failures.yaml")
LONGEST_LINE = 300
LOW_MEMORY_SHARE = 0.05
"""A rank killed by SIGKILL while less than this share of the host's memory was available counts as
killed for lack of memory: in a container the kernel's count of OOM kills may be hidden."""


@dataclass(frozen=True)
class Evidence:
    """What a run left.

    Attributes:
        exit_code: of command.sh; negative where a signal ended it, as subprocess reports it.
        log: the text of logs.txt.
        stopped_by: the signal that asked the launcher to end the run.
        because_ended: the parent process, such as make, whose end ended the run.
        reason: why its batch job asked it to end, such as ``before the time limit of its job``.
        saved: the step of its newest checkpoint; 0 where it has none.
        asked_to_end: its ranks saved a checkpoint and ended because one of them was asked to.
        hang: what the launcher found when it ended a hanging run.
        oom_kills: processes that the kernel killed for lack of memory during the run.
        least_free_share: smallest available share of the host's memory during the run, 0 to 1.
    """

    exit_code: int
    log: str = ""
    errors: tuple[RankError, ...] = ()
    metrics: tuple[StepMetrics, ...] = ()
    validation: tuple[Validation, ...] = ()
    stopped_by: signal.Signals | None = None
    because_ended: str | None = None
    reason: str | None = None
    saved: int = 0
    asked_to_end: bool = False
    hang: str | None = None
    oom_kills: int = 0
    least_free_share: float = 1.0


@dataclass(frozen=True)
class RunOutcome:
    """The status, its evidence (up to three lines), the rank it came from, and advice.

    ``is_consequence``: the evidence may be the effect of another node's failure.
    """

    status: Status
    detail: str | None = None
    rank: int | None = None
    advice: str | None = None
    is_consequence: bool = False


@dataclass(frozen=True)
class FailureRule:
    """A pattern in an error, the status it means, and advice; see failures.yaml.

    ``anywhere``: specific enough to count in any line of the log, not only in the first error.
    """

    pattern: re.Pattern[str]
    status: Status
    advice: str
    anywhere: bool


@dataclass(frozen=True)
class Failure:
    """The end of one rank (or of torchrun, where ``rank`` is None), from one source of evidence."""

    rank: int | None
    message: str
    context: str = ""
    time: float = math.inf

    @property
    def is_echo(self) -> bool:
        """Whether another rank's end caused it: a closed connection, or SIGTERM from torchrun."""
        return bool(_ECHO.search(self.message))


def classify(evidence: Evidence, experiment: Experiment) -> RunOutcome:
    """The outcome of a run, by its first error in time, without echoes of it in other ranks."""
    done = evidence.metrics[-1].step if evidence.metrics else 0
    progress = f"after step {done} of {experiment.steps}"
    lost = next((m for m in evidence.metrics if m.nan or not math.isfinite(m.loss or 0)), None)
    early = evidence.exit_code != 0 or done < experiment.steps
    if (evidence.stopped_by or evidence.asked_to_end) and early:
        return _ended_early(evidence, progress)
    if evidence.hang:
        return RunOutcome(
            "hang", evidence.hang, advice="ranks/*.stacks.txt hold every thread's stack"
        )
    if lost:
        return _named("nan", f"the loss is {lost.loss} at step {lost.step}", None, experiment)
    elsewhere = experiment.nodes > 1 and not done
    held_out = [v for v in evidence.validation if v.split == "validation"]
    wanted = experiment.until.validation_loss if experiment.until else -math.inf
    if evidence.exit_code == 0 and (low := next((v for v in held_out if v.loss <= wanted), None)):
        return RunOutcome(
            "ok", f"loss {low.loss:.4f} on held-out data at step {low.step}, {wanted:g} wanted"
        )
    if evidence.exit_code == 0 and experiment.until and held_out and done >= experiment.steps:
        detail = (
            f"loss {min(v.loss for v in held_out):.4f} on held-out data {progress}, {wanted:g}"
            " wanted"
        )
        return RunOutcome(
            "target-missed", detail, advice="more STEPS=, or another learning rate (LR=)"
        )
    if evidence.exit_code == 0 and done < experiment.steps and not elsewhere:
        return RunOutcome(
            "crash",
            f"it ended without an error {progress}",
            advice="the end of logs.txt may say why",
        )
    if evidence.exit_code == 0:
        return RunOutcome("ok")
    return _first_error(evidence, experiment)


def _ended_early(evidence: Evidence, progress: str) -> RunOutcome:
    """The outcome of a run that was asked to end."""
    by = evidence.stopped_by
    why = f"by {_cause(by)}" if by else "as another node asked"
    if evidence.because_ended:
        why = f"because {evidence.because_ended}, which started it, is gone,"
    why = evidence.reason or why
    if not evidence.saved:
        return RunOutcome("killed", f"ended {why} {progress}", advice="the results so far are kept")
    return RunOutcome(
        "killed",
        f"ended {why} {progress}; its newest checkpoint is of step {evidence.saved}",
        advice="RESUME=1 resumes it",
    )


def address_in_use(log: str) -> bool:
    """Whether a port that torchrun or a rank chose was taken."""
    return bool(_rules()["address in use"].pattern.search(log))


def memory_levers(experiment: Experiment) -> str:
    """Advice: up to three changes that lower memory by formula and keep to all constraints."""
    settings = [
        " ".join(map("=".join, words.items())) for words, _ in islice(levers(experiment), 3)
    ]
    return f"use less memory per GPU: try {' or '.join(settings) or 'a smaller SEQ='}"


def _host_memory(experiment: Experiment) -> str:
    ranks = experiment.ranks_per_node
    fewer = f"fewer than {ranks} ranks (GPUS=), " if ranks > 1 else ""
    return f"the host ran out of memory: {fewer}a smaller SEQ= or MBS=, or end other programs there"


_SHARED_MEMORY = (
    "/dev/shm is too small for NCCL or the data loaders; a container wants docker run --ipc=host"
)


def _checks(damage: str, experiment: Experiment) -> str:
    """Advice to check the data sets for ``damage``; empty where it reads none."""
    names = [word.partition(":")[0] for word in experiment.data.replace(",", " ").split()]
    checks = [f"make data-check NAME={name}" for name in names if name != "mock"]
    return f"{damage}: {' and '.join(checks)}" if checks else ""


_COMPUTED: dict[str, Callable[[Experiment], str]] = {
    "memory_levers": memory_levers,
    "host_memory": _host_memory,
    "shared_memory": lambda e: _SHARED_MEMORY,
    "truncated_data": lambda e: _checks("; or a data file was truncated during the run", e),
    "damaged_data": lambda e: _checks(", as in damaged data", e),
    "make_room": lambda e: MAKE_ROOM,
}
"""What replaces ``{names}`` in the advice of a rule."""


@cache
def _rules() -> dict[str, FailureRule]:
    """The known failures, by name, in the order in which they are tried."""
    return {
        name: FailureRule(
            re.compile("|".join(entry["patterns"]), re.IGNORECASE),
            entry["status"],
            entry["advice"],
            entry.get("anywhere", True),
        )
        for name, entry in yaml_files.read(FAILURES).items()
    }


_ECHO = re.compile(
    r"Connection (was )?(closed|reset|refused)|Broken pipe|remote process (exited|has terminated)"
    r"|ncclRemoteError|Socket.*(closed|reset)|failed to recv|ended by SIGTERM",
    re.IGNORECASE,
)
_SUMMARY = re.compile(
    r"^  time +: (?P<time>\S+)\n  host .*\n  rank +: (?P<rank>\d+) .*\n  exitcode +:"
    r" (?P<exitcode>-?\d+) ",
    re.MULTILINE,
)
_SIGNALLED_FIRST = re.compile(
    r"^Root Cause .*:\n\[\d+\]:\n(?:  .*\n)*?  exitcode +: -\d+ ", re.MULTILINE
)
"""torchrun's summary where a signal ended the first rank that failed: that is a cause, no echo."""
_RANK_PREFIX = re.compile(r"^\[rank(\d+)\]:(?: |$)")
_PRINTED_ERROR = re.compile(r"^(?:\S+\.py: )?error: ")
_LAST_WORDS = re.compile(
    r"^(?:terminate called .*(?:\n +what\(\): .*)?|\w+\(\): .*|double free or .*|corrupted .*|.*:"
    r" Assertion `.*' failed\.)$",
    re.MULTILINE,
)
"""What C++ and the C library print before they abort the process."""


def _first_error(evidence: Evidence, experiment: Experiment) -> RunOutcome:
    summary = list(_from_summary(evidence))
    failures = [*_from_rank_files(evidence), *_from_log(evidence.log)]
    explained = {failure.rank for failure in failures if failure.message}
    failures += [failure for failure in summary if failure.message or failure.rank not in explained]
    first = min(
        failures, key=lambda f: (f.is_echo, not f.message, f.time), default=Failure(None, "")
    )
    message = first.message
    rule = _match(f"{message}\n{first.context}")
    rank_in_line = None
    if (rule is None or first.is_echo) and (in_log := _match_log(evidence.log)):
        rule, line = in_log
        rank_in_line = _rank_in(line)
        message = f"{line}\n{message}"
    root_cause = min(
        (f for f in summary if not f.is_echo), key=lambda f: f.time, default=Failure(None, "")
    )
    rank = next((r for r in (rank_in_line, first.rank, root_cause.rank) if r is not None), None)
    detail = _shorten(message) or f"exit code {evidence.exit_code}"
    unnamed = (first.is_echo or not first.message) and not _SIGNALLED_FIRST.search(evidence.log)
    if rule is None:
        return RunOutcome(
            "crash",
            detail,
            rank,
            "logs.txt has its traceback and what came before",
            is_consequence=unnamed,
        )
    weak = rule.status in ("killed", "hang") or bool(_ECHO.search(message.splitlines()[0]))
    return replace(
        _named(rule.status, detail, rank, experiment, rule), is_consequence=unnamed and weak
    )


def _named(
    status: Status,
    detail: str,
    rank: int | None,
    experiment: Experiment,
    rule: FailureRule | None = None,
) -> RunOutcome:
    rule = rule or next(rule for rule in _rules().values() if rule.status == status)
    computed = {n: f(experiment) for n, f in _COMPUTED.items() if f"{{{n}}}" in rule.advice}
    return RunOutcome(status, detail, rank, rule.advice.format(**computed))


def _from_rank_files(evidence: Evidence) -> Iterator[Failure]:
    """Exceptions of ranks. The reason of a SystemExit is in the log; UserErrors are for users."""
    for error in evidence.errors:
        messages = {"SystemExit": "", "UserError": f"error: {error.message}"}
        message = messages.get(error.type, f"{error.type}: {error.message}")
        yield Failure(error.rank, message, error.traceback, error.time)


def _from_summary(evidence: Evidence) -> Iterator[Failure]:
    """Ranks in torchrun's summary.

    It truncates times to seconds; the end of that second keeps errors with exact times first.
    """
    for entry in _SUMMARY.finditer(evidence.log):
        code = int(entry["exitcode"])
        time = datetime.fromisoformat(entry["time"].replace("_", "T")).timestamp() + 1
        yield Failure(
            int(entry["rank"]), _signalled(-code, evidence) if code < 0 else "", time=time
        )
    if evidence.exit_code < 0:
        yield Failure(None, f"torchrun: {_signalled(-evidence.exit_code, evidence)}")


def _signalled(number: int, evidence: Evidence) -> str:
    text = f"ended by {_signal_name(number)}"
    if number == signal.SIGABRT and (last := _LAST_WORDS.search(evidence.log)):
        return f"{text}: {' '.join(last[0].split())}"
    if number != signal.SIGKILL:
        return text
    if evidence.oom_kills:
        return f"{text}: the kernel killed it for lack of memory"
    if evidence.least_free_share < LOW_MEMORY_SHARE:
        return f"{text} for lack of memory: {evidence.least_free_share:.1%} of the host's was left"
    return text


def _from_log(log: str) -> Iterator[Failure]:
    """Tracebacks and printed errors in the order of the log.

    They have no time, so the error files of ranks come first.
    """
    open_tracebacks: dict[int | None, list[str]] = {}
    for line in log.splitlines():
        prefix = _RANK_PREFIX.match(line)
        rank = int(prefix[1]) if prefix else None
        text = line[prefix.end() :] if prefix else line
        if text.startswith("Traceback (most recent call last)"):
            open_tracebacks[rank] = [text]
        elif rank in open_tracebacks and text.startswith(" "):
            open_tracebacks[rank].append(text)
        elif rank in open_tracebacks and text:
            context = "\n".join(open_tracebacks.pop(rank))
            if "ChildFailedError" not in text:
                yield Failure(rank, text, context)
        elif _PRINTED_ERROR.match(text):
            yield Failure(rank, text)


def _match(text: str) -> FailureRule | None:
    return next((rule for rule in _rules().values() if rule.pattern.search(text)), None)


def _match_log(log: str) -> tuple[FailureRule, str] | None:
    """The first rule for any line of the log that matches, with the line."""
    for rule in _rules().values():
        if rule.anywhere and (found := rule.pattern.search(log)):
            start, end = log.rfind("\n", 0, found.start()) + 1, log.find("\n", found.end())
            return rule, log[start : end if end >= 0 else None].strip()
    return None


def _rank_in(line: str) -> int | None:
    found = re.search(r"\brank ?(\d+)\b", line, re.IGNORECASE)
    return int(found[1]) if found else None


def _shorten(message: str) -> str:
    lines = [line.strip() for line in message.splitlines() if line.strip()][:3]
    return "\n".join(
        line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]}…" for line in lines
    )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _cause(number: signal.Signals) -> str:
    return {signal.SIGINT: "Ctrl-C", signal.SIGHUP: "the closed terminal (SIGHUP)"}.get(
        number, number.name
    )
