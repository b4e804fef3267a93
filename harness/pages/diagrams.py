"""The diagrams of the chapters, drawn as SVG: who holds what, what is sent when, where the memory
goes.

Each is a card with a background of its own, so that it reads the same in light and in dark. Numbers
in a diagram are computed by the formulas that the text quotes, or are those of a record.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING

from harness.experiment.constraints import with_changes
from harness.experiment.hardware import find_card
from harness.predict import timeline
from harness.predict.flops import state_of_parameter
from harness.predict.formulas import OF_EXPERIMENT, activations_per_sbh

if TYPE_CHECKING:
    from harness.evidence.facts import Facts

INK, QUIET, RULE, CARD = "#1f2328", "#57606a", "#d0d7de", "#ffffff"
WEIGHTS, GRADIENTS, OPTIMIZER, ACTIVATIONS = "#4e79a7", "#f28e2b", "#8e6bbf", "#59a14f"
OTHER, RESERVED, CONTEXT = "#9a9a9a", "#c9ced4", "#444c56"
EMPTY, WHOLE, SENT, IDLE = "#eef1f4", "#6e7781", "#d1495b", "#eef1f4"
FONTS = "system-ui, -apple-system, Segoe UI, Helvetica, sans-serif"
RANKS = ("#4e79a7", "#f28e2b", "#59a14f", "#b07aa1")
LIGHT_RANKS = ("#c6d6e6", "#fbd9b5", "#c9e2c4", "#e2d2df")


class Drawing:
    """An SVG that grows by shapes. Coordinates and sizes are pixels."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.size, self.title, self.shapes = (width, height), title, []

    def rect(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: str,
        line: str = "none",
        dashed: bool = False,
    ) -> None:
        dash = ' stroke-dasharray="3 2"' * dashed
        self.shapes.append(
            f'<rect x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}" '
            f'rx="2" fill="{fill}" stroke="{line}"{dash}/>'
        )

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        size: int = 12,
        colour: str = INK,
        anchor: str = "start",
        bold: bool = False,
    ) -> None:
        weight = ' font-weight="600"' * bold
        self.shapes.append(
            f'<text x="{_n(x)}" y="{_n(y)}" font-size="{size}" fill="{colour}" '
            f'text-anchor="{anchor}"{weight}>{escape(words)}</text>'
        )

    def head(self, x: float, y: float, words: str) -> None:
        self.text(x, y, words, size=13, bold=True)

    def note(self, y: float, words: str) -> None:
        self.text(24, y, words, size=11, colour=QUIET)

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: str,
        words: str,
        *,
        size: int = 11,
        colour: str = CARD,
    ) -> None:
        self.rect(x, y, width, height, fill)
        self.text(
            x + width / 2,
            y + height / 2 + size * 0.36,
            words,
            size=size,
            colour=colour,
            anchor="middle",
        )

    def arrow(
        self, x1: float, y1: float, x2: float, y2: float, colour: str = SENT, both: bool = False
    ) -> None:
        ends = ' marker-start="url(#head)"' * both
        self.shapes.append(
            f'<line x1="{_n(x1)}" y1="{_n(y1)}" x2="{_n(x2)}" y2="{_n(y2)}" stroke="{colour}" '
            f'stroke-width="1.6" marker-end="url(#head)"{ends}/>'
        )

    def line(
        self, x1: float, y1: float, x2: float, y2: float, colour: str = RULE, dashed: bool = False
    ) -> None:
        dash = ' stroke-dasharray="4 3"' * dashed
        self.shapes.append(
            f'<line x1="{_n(x1)}" y1="{_n(y1)}" x2="{_n(x2)}" y2="{_n(y2)}"'
            f' stroke="{colour}"{dash}/>'
        )

    def dot(self, x: float, y: float, colour: str) -> None:
        self.shapes.append(
            f'<circle cx="{_n(x)}" cy="{_n(y)}" r="4" fill="{colour}" fill-opacity="0.8"/>'
        )

    def legend(self, x: float, y: float, entries: Sequence[tuple[str, str]]) -> None:
        for colour, words in entries:
            self.rect(x, y - 9, 11, 11, colour, RULE if colour == EMPTY else "none")
            self.text(x + 16, y, words, size=11, colour=QUIET)
            x += 16 + 6.1 * len(words) + 20

    def svg(self) -> str:
        width, height = self.size
        return "\n".join(
            [
                (
                    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
                    f' width="{width}" height="{height}" role="img"'
                    f' aria-label="{escape(self.title)}" font-family="{FONTS}">'
                ),
                f"<title>{escape(self.title)}</title>",
                (
                    '<defs><marker id="head" viewBox="0 0 8 8" refX="6.5" refY="4" markerWidth="6"'
                    ' markerHeight="6" orient="auto-start-reverse"><path d="M0 0L8 4L0 8z"'
                    f' fill="{SENT}"/></marker></defs>'
                ),
                (
                    f'<rect x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8"'
                    f' fill="{CARD}" stroke="{RULE}"/>'
                ),
                *self.shapes,
                "</svg>",
                "",
            ]
        )


def _dp_shards(facts: Facts) -> Drawing:
    e = facts.catalog.find("114")
    levels = (
        ("no_shard", "replicated", "104 114 118", ()),
        ("optim", "distributed optimizer", "published as ZeRO-2", ("optimizer",)),
        ("fsdp_optim_grads", "FSDP optim_grads", "ZeRO-2", ("optimizer", "gradients")),
        (
            "fsdp_optim_grads_params",
            "FSDP optim_grads_params",
            "ZeRO-3",
            ("optimizer", "gradients", "weights"),
        ),
    )
    d = Drawing(
        876, 290, "Which of four GPUs holds which part of weights, gradients and optimizer state"
    )
    for i, (sharding, title, other, sharded) in enumerate(levels):
        x0 = 24 + 210 * i
        d.head(x0, 28, title)
        d.text(x0, 45, other, colour=QUIET, size=11)
        whole = state_of_parameter(with_changes(e, sharding=sharding), 1)
        for rank in range(e.dp):
            x, y = x0 + 44 * rank, 58
            for name, colour in (
                ("weights", WEIGHTS),
                ("gradients", GRADIENTS),
                ("optimizer", OPTIMIZER),
            ):
                height = 9 * getattr(whole, name)
                split = name in sharded
                d.rect(x, y, 36, height - 2, EMPTY if split else colour, RULE)
                if split:
                    d.rect(x, y + rank * (height - 2) / e.dp, 36, (height - 2) / e.dp, colour)
                y += height
            d.text(x + 18, 236, f"GPU {rank}", size=11, colour=QUIET, anchor="middle")
        per_parameter = state_of_parameter(with_changes(e, sharding=sharding), e.dp)
        d.text(x0, 256, f"{per_parameter.total:g} bytes a parameter", size=12)
    d.legend(
        24,
        278,
        (
            (WEIGHTS, "weights: 2 bytes"),
            (GRADIENTS, "gradients: 4, FSDP 2"),
            (OPTIMIZER, "optimizer, fp32 copy + 2 moments: 12 bytes"),
            (EMPTY, "held by another GPU"),
        ),
    )
    return d


def _dp_step(facts: Facts) -> Drawing:
    d = Drawing(
        860, 262, "One step of data parallelism, with and without the distributed optimizer"
    )
    rows = (
        (
            "replicated: one all-reduce after the last gradient",
            (("forward", 150), ("backward", 300), ("", 180), ("Adam, all of it", 110)),
            ((450, 180, "all-reduce of fp32 gradients"),),
        ),
        (
            "distributed optimizer: every bucket is sent as soon as it is ready",
            (("forward", 150), ("backward", 300), ("", 12), ("Adam, 1/n", 72)),
            (
                (0, 150, "all-gather of bf16 weights"),
                (190, 272, "reduce-scatter of fp32 gradients"),
            ),
        ),
    )
    for i, (title, computed, sent) in enumerate(rows):
        y = 30 + 112 * i
        d.head(24, y, title)
        d.text(24, y + 31, "computes", size=11, colour=QUIET)
        d.text(24, y + 63, "sends", size=11, colour=QUIET)
        x = 92
        for words, width in computed:
            if words:
                d.box(
                    x,
                    y + 14,
                    width - 2,
                    26,
                    {"forward": WEIGHTS, "backward": ACTIVATIONS}.get(words, OPTIMIZER),
                    words,
                )
            else:
                d.rect(x, y + 14, width - 2, 26, IDLE, RULE, dashed=True)
            x += width
        for start, width, words in sent:
            d.box(92 + start, y + 46, width - 2, 26, SENT, words)
    d.note(
        248,
        "Not to scale. The weights that a step updates are gathered while the next step's forward"
        " pass runs.",
    )
    return d


def _tp_layer(facts: Facts) -> Drawing:
    d = Drawing(
        860,
        330,
        "A transformer layer on two GPUs: tensor parallelism without and with sequence parallelism",
    )
    parts = (
        ("norm", False),
        ("QKV", True),
        ("attention", True),
        ("out", True),
        ("dropout", False),
        ("norm", False),
        ("MLP up", True),
        ("MLP down", True),
        ("dropout", False),
    )
    for i, (title, sequence) in enumerate(
        (("tensor parallel", False), ("tensor + sequence parallel", True))
    ):
        y0, x = 34 + 148 * i, 72
        d.head(24, y0, title)
        for rank in range(2):
            d.text(24, y0 + 36 + 46 * rank, f"GPU {rank}", size=11, colour=QUIET)
        for n, (words, split) in enumerate(parts):
            before = parts[n - 1][1] if n else False
            if split != before:
                into = split
                words_sent = (
                    ("all-gather" if into else "reduce-scatter")
                    if sequence
                    else ("" if into else "all-reduce")
                )
                if words_sent:
                    d.rect(x, y0 + 14, 14, 82, SENT)
                    d.text(x + 7, y0 + 112, words_sent, size=10, colour=SENT, anchor="middle")
                x += 22
            for rank in range(2):
                y = y0 + 14 + 46 * rank
                if split:
                    d.box(x, y, 74, 36, RANKS[rank], words)
                elif sequence:
                    d.rect(x, y, 58, 36, EMPTY, RULE)
                    d.box(x, y + 18 * rank, 58, 18, LIGHT_RANKS[rank], words, colour=INK)
                else:
                    d.box(x, y, 58, 36, WHOLE, words)
            x += (74 if split else 58) + 6
    d.legend(
        24,
        314,
        (
            (RANKS[0], "half of the heads or columns"),
            (WHOLE, "the same activations, whole, on both"),
            (LIGHT_RANKS[0], "half of the tokens"),
            (SENT, "sent, forward pass"),
        ),
    )
    return d


def _tp_activations(facts: Facts) -> Drawing:
    d = Drawing(860, 214, "Bytes of activations a layer keeps, by parallelism and recomputation")
    e = facts.catalog.find("281")
    alone = with_changes(e, tp=1)
    rows = (
        ("one GPU: 34", alone, ""),
        (f"TP {e.tp}: 10 + 24/t", e, "281"),
        (f"TP {e.tp} + SP: 34/t", facts.catalog.find("282"), "282"),
        (f"TP {e.tp}, full recompute: 2", facts.catalog.find("283"), "283"),
    )
    d.head(
        24,
        28,
        "Activations of a layer in units of s·b·h bytes, and of the whole 22B model at MBS 4",
    )
    for i, (words, row, id_) in enumerate(rows):
        y, units = 46 + 36 * i, activations_per_sbh(row)
        d.text(24, y + 18, f"{id_}  {words}".strip(), size=12)
        d.rect(230, y + 2, 14 * units, 24, WHOLE if id_ in ("", "281") else ACTIVATIONS)
        d.text(
            238 + 14 * units,
            y + 18,
            f"{units:g}:  {OF_EXPERIMENT['activations_gib'](row):.0f} GiB",
            size=12,
        )
    d.note(
        200,
        "Korthikanti et al. 2022, table 2; scores not stored (flash attention). GiB: with logits,"
        " and one layer whole while it is recomputed.",
    )
    return d


def _cp_chunks(facts: Facts) -> Drawing:
    ranks, cell = 4, 26
    chunks = 2 * ranks
    d = Drawing(
        860,
        300,
        "Which rank holds which chunk of the sequence, and the attention it has to compute",
    )
    orders = (
        ("in order", [c // 2 for c in range(chunks)]),
        (
            "as upstream: rank r holds chunks r and 2n-1-r",
            [min(c, chunks - 1 - c) for c in range(chunks)],
        ),
    )
    for i, (title, owner) in enumerate(orders):
        x0, y0 = 44 + 416 * i, 58
        d.head(x0 - 20, 28, title)
        d.text(x0, 50, "keys and values of chunk 0 … 7", size=10, colour=QUIET)
        for q in range(chunks):
            for k in range(chunks):
                d.rect(
                    x0 + cell * k,
                    y0 + cell * q,
                    cell - 1,
                    cell - 1,
                    RANKS[owner[q]] if k <= q else EMPTY,
                )
            d.text(x0 - 6, y0 + cell * q + 17, str(q), size=10, colour=QUIET, anchor="end")
        work = [sum(q + 0.5 for q in range(chunks) if owner[q] == rank) for rank in range(ranks)]
        for rank in range(ranks):
            y = y0 + 52 * rank
            d.rect(x0 + 226, y + 4, 6.5 * work[rank], 22, RANKS[rank])
            d.text(
                x0 + 226,
                y + 42,
                f"rank {rank}: {work[rank] / sum(work):.0%} of the work",
                size=11,
                colour=QUIET,
            )
    d.note(
        286,
        "Rows: queries of a chunk; coloured: the keys that they may see (causal mask), in the"
        " colour of the rank that computes them.",
    )
    return d


def _cp_exchange(facts: Facts) -> Drawing:
    d = Drawing(860, 286, "Three ways to exchange keys and values between context-parallel ranks")
    titles = (
        ("p2p", "ring: K and V go round, n-1 times", "sent while the last piece is computed"),
        ("all_gather", "everyone collects all K and V first", "nothing to compute meanwhile"),
        ("a2a", "Ulysses: tokens are exchanged for heads", "whole sequence, 1/n of the heads"),
    )
    for i, (name, what, when) in enumerate(titles):
        x0 = 24 + 284 * i
        d.text(x0, 28, name, bold=True, size=13)
        d.text(x0, 46, what, size=11, colour=QUIET)
        d.text(x0, 262, when, size=11, colour=QUIET)
    corners = ((60, 82), (186, 82), (186, 182), (60, 182))
    for rank, (x, y) in enumerate(corners):
        d.box(x, y, 44, 44, RANKS[rank], f"Q{rank}", size=13)
        d.text(
            x + 22,
            y + (-5 if rank < 2 else 58),
            f"K{rank} V{rank}",
            size=10,
            colour=SENT,
            anchor="middle",
        )
    for x1, y1, x2, y2 in (
        (108, 104, 182, 104),
        (208, 130, 208, 178),
        (182, 204, 108, 204),
        (82, 178, 82, 130),
    ):
        d.arrow(x1, y1, x2, y2)
    for rank in range(4):
        y = 68 + 44 * rank
        d.box(308, y, 44, 34, RANKS[rank], f"Q{rank}", size=13)
        for other in range(4):
            fill, ink = (RANKS[other], CARD) if other == rank else (LIGHT_RANKS[other], INK)
            d.box(366 + 46 * other, y, 42, 34, fill, f"K{other} V{other}", size=10, colour=ink)
    for x0, title, by_tokens in ((592, "before", True), (734, "after", False)):
        d.text(x0, 74, title, size=11)
        for token in range(4):
            for head in range(4):
                d.rect(x0 + 22 * head, 84 + 30 * token, 21, 29, RANKS[token if by_tokens else head])
        d.text(x0 + 44, 222, "heads", size=10, colour=QUIET, anchor="middle")
    d.text(592, 242, "rows: tokens; colour: the rank that holds it", size=10, colour=QUIET)
    d.arrow(690, 144, 726, 144)
    return d


def _pp_layers(facts: Facts) -> Drawing:
    d = Drawing(860, 172, "Which of four GPUs holds which of sixteen layers")
    for i, (title, chunks) in enumerate(
        (("PP 4", 1), ("PP 4, VPP 2", 2), ("PP 4, VPP 4: one layer a virtual stage", 4))
    ):
        y, size = 40 + 40 * i, 16 // (4 * chunks)
        d.text(24, y + 2, title, size=12, bold=True)
        for layer in range(16):
            d.box(290 + 33 * layer, y - 14, 31, 24, RANKS[layer // size % 4], str(layer))
    d.legend(24, 156, tuple((RANKS[rank], f"GPU {rank}") for rank in range(4)))
    d.text(
        316,
        156,
        "A change of colour is a message: activations forward, gradients back.",
        size=11,
        colour=QUIET,
    )
    return d


def _pp_schedule(facts: Facts) -> Drawing:
    d = Drawing(
        860,
        404,
        "One step of a four-stage pipeline: 1F1B with four and eight micro-batches, and"
        " interleaved",
    )
    plans = (
        ("four micro-batches", 4, 1, 2),
        ("eight half as large: the same work", 8, 1, 1),
        ("eight, two virtual stages a GPU", 8, 2, 1),
    )
    runs = [
        timeline.simulate(m, timeline.Times.alike(4, unit, 2 * unit), chunks)
        for _, m, chunks, unit in plans
    ]
    scale = 700 / max(run.end for run in runs)
    for i, ((title, m, chunks, _), run) in enumerate(zip(plans, runs, strict=True)):
        y0 = 34 + 116 * i
        d.head(
            24,
            y0,
            f"{title}: waits {run.bubble_fraction:.0%} of the time it works, (p-1)/(v m) ="
            f" 3/{chunks * m}",
        )
        for stage in range(run.stages):
            y = y0 + 10 + 20 * stage
            d.text(24, y + 14, f"GPU {stage}", size=11, colour=QUIET)
            d.rect(80, y, run.end * scale, 19, IDLE)
            for span in run.of_stage(stage):
                colours = (
                    (WEIGHTS, "#86a9cc")
                    if span.work.kind == "forward"
                    else (ACTIVATIONS, "#8fc488")
                )
                x, width = 80 + span.start * scale, (span.end - span.start) * scale - 1
                d.box(x, y, width, 19, colours[span.work.chunk], str(span.work.micro_batch), size=9)
    d.legend(
        24,
        388,
        (
            (WEIGHTS, "forward"),
            (ACTIVATIONS, "backward, twice as long"),
            ("#86a9cc", "second virtual stage"),
            (IDLE, "waits"),
        ),
    )
    return d


def _ep_experts(facts: Facts) -> Drawing:
    d = Drawing(860, 250, "Which of four GPUs holds which of eight experts")
    rows = (
        ("data parallel", "all 8 experts", lambda rank, expert: (0, 1)),
        ("EP 4", "2 whole experts", lambda rank, expert: (0, 1) if expert // 2 == rank else None),
        (
            "EP 2, expert TP 2",
            "4 halves of experts",
            lambda rank, expert: (rank % 2 / 2, 0.5) if expert // 4 == rank // 2 else None,
        ),
    )
    for rank in range(4):
        d.text(200 + 165 * rank, 28, f"GPU {rank}", size=12, bold=True)
    for i, (title, held, part) in enumerate(rows):
        y = 44 + 62 * i
        d.text(24, y + 16, title, size=12, bold=True)
        d.text(24, y + 33, held, size=11, colour=QUIET)
        for rank in range(4):
            for expert in range(8):
                x, share = 200 + 165 * rank + 18 * expert, part(rank, expert)
                d.rect(x, y, 16, 40, EMPTY, RULE)
                if share:
                    d.rect(x, y + 40 * share[0], 16, 40 * share[1], RANKS[rank])
                    d.text(
                        x + 8,
                        y + 40 * (share[0] + share[1] / 2) + 4,
                        str(expert),
                        size=10,
                        colour=CARD,
                        anchor="middle",
                    )
    d.note(
        236,
        "Attention, norms, embeddings and the router are on every GPU in all three. Numbers:"
        " experts.",
    )
    return d


def _ep_dispatch(facts: Facts) -> Drawing:
    d = Drawing(860, 252, "Dispatch and combine: tokens go to their experts and come back")
    routed = ((0, 2, 1, 3), (3, 0, 2, 1))
    tokens = [(rank, n, expert) for rank in range(2) for n, expert in enumerate(routed[rank])]
    columns = (
        ("tokens, as the batch has them", 24),
        ("grouped by expert", 330),
        ("in their places again", 660),
    )
    for title, x in columns:
        d.head(x, 28, title)
    by_expert = sorted(tokens, key=lambda token: token[2])
    gathered = {(rank, n): divmod(place, 4) for place, (rank, n, _) in enumerate(by_expert)}
    for rank in range(2):
        y = 48 + 92 * rank
        for _, x in columns:
            d.rect(x - 4, y - 6, 182, 66, CARD, RULE)
            held = f": experts {2 * rank} and {2 * rank + 1}" if x == 330 else ""
            d.text(x + 2, y + 52, f"GPU {rank}{held}", size=11, colour=QUIET)
    for rank, n, expert in tokens:
        gpu, place = gathered[rank, n]
        for x, row, i in ((24, rank, n), (330, gpu, place), (660, rank, n)):
            d.box(x + 44 * i, 48 + 92 * row, 40, 34, RANKS[expert], f"{'ab'[rank]}{n}", size=12)
    for x in (214, 520):
        d.arrow(x, 78, x + 100, 162)
        d.arrow(x, 162, x + 100, 78)
        d.text(
            x + 50,
            224,
            ("dispatch" if x == 214 else "combine") + ": all-to-all",
            size=11,
            colour=SENT,
            anchor="middle",
        )
    d.note(
        240,
        "Colour: the expert chosen by the router. The backward pass sends the same, the other way.",
    )
    return d


def _memory(facts: Facts) -> Drawing:
    ids = ("101", "111", "115", "244", "304")
    card = find_card("h100-80gb").memory_mib / 1024
    d = Drawing(860, 62 + 44 * len(ids) + 46, "Where the memory of a GPU goes")
    d.head(24, 28, "Memory of one GPU, GiB: pieces by formula, totals as measured")
    scale, x0 = 560 / card, 190
    pieces = (
        ("weights_gib", WEIGHTS),
        ("gradients_gib", GRADIENTS),
        ("optimizer_gib", OPTIMIZER),
        ("activations_gib", ACTIVATIONS),
    )
    for i, id_ in enumerate(ids):
        e, ours, x, y = facts.catalog.find(id_), facts.row(id_), 0.0, 46 + 44 * i
        d.text(24, y + 15, f"{id_}", bold=True)
        d.text(
            24,
            y + 30,
            e.slug.removeprefix("gpt2xl-").removeprefix("strong-scale-")[:24],
            size=10,
            colour=QUIET,
        )
        widths = [(OF_EXPERIMENT[name](e), colour) for name, colour in pieces]
        if ours and ours.memory_gib.nvml:
            m, known = ours.memory_gib, sum(width for width, _ in widths)
            widths += [
                (m.allocated - known, OTHER),
                (m.reserved - m.allocated, RESERVED),
                (m.nvml - m.reserved, CONTEXT),
            ]
            d.text(x0 + card * scale + 14, y + 20, f"{m.nvml:.1f} GiB in use", size=11)
        for width, colour in widths:
            d.rect(x0 + x * scale, y, max(width, 0) * scale, 30, colour)
            x += width
    bottom = 46 + 44 * len(ids)
    d.line(x0 + card * scale, 40, x0 + card * scale, bottom, SENT, dashed=True)
    d.text(x0 + card * scale - 4, 34, f"80 GB card: {card:.1f}", size=11, colour=SENT, anchor="end")
    d.legend(
        24,
        bottom + 18,
        (
            (WEIGHTS, "weights"),
            (GRADIENTS, "gradients"),
            (OPTIMIZER, "optimizer state"),
            (ACTIVATIONS, "activations"),
            (OTHER, "other tensors"),
        ),
    )
    d.legend(
        24,
        bottom + 36,
        (
            (RESERVED, "held by PyTorch's allocator, not in use"),
            (CONTEXT, "CUDA context, kernels, NCCL"),
        ),
    )
    return d


DRAWINGS: dict[str, Callable[[Facts], Drawing]] = {
    "dp-shards": _dp_shards,
    "dp-step": _dp_step,
    "tp-layer": _tp_layer,
    "tp-activations": _tp_activations,
    "cp-chunks": _cp_chunks,
    "cp-exchange": _cp_exchange,
    "pp-layers": _pp_layers,
    "pp-schedule": _pp_schedule,
    "ep-experts": _ep_experts,
    "ep-dispatch": _ep_dispatch,
    "memory": _memory,
}


def _n(number: float) -> str:
    return f"{number:.1f}".rstrip("0").rstrip(".")
