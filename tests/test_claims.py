"""Claims: what claims.yaml says, how a formula is read, when it holds, and what it is never evaluated on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from harness import ROOT
from harness.cli import main
from harness.errors import UserError
from harness.evidence.claims import CLAIMS, Bound, Side, evaluate, load_claims, sources
from harness.evidence.expressions import Quantity, parse, spell
from harness.evidence.facts import Facts
from harness.evidence.quantities import RanOutOfMemory, unit_of
from harness.evidence.records import metrics_of
from harness.evidence.references import load_references
from harness.evidence.results import collect, collect_records
from harness.evidence.verdicts import render
from harness.experiment.catalog import load_catalog
from harness.run.step_statistics import step_noise_ms
from harness.system.files import write_json

RECORDS = ROOT / "experiments" / "records"
KEPT = RECORDS / "h200-141gb"
CATALOG, REFERENCES = load_catalog(), load_references()
ALL = load_claims(CATALOG)


def claims(tmp_path: Path, **fields: object) -> tuple:
    """The one claim of a file that says this; without a formula, that 115 takes less memory than 114."""
    one = {
        "chapter": 100,
        "says": "so it is",
        "formula": "memory_gib[115] / memory_gib[114]",
        "must": "< 0.9",
        **fields,
    }
    path = tmp_path / "claims.yaml"
    path.write_text(yaml.safe_dump({"it": one}), encoding="utf-8")
    return load_claims(CATALOG, path)


def sides(
    tmp_path: Path, records: Path = RECORDS, group: str | None = None, **fields: object
) -> list[Side]:
    rows = collect_records(records, REFERENCES).rows
    columns = sources(rows, CATALOG, REFERENCES, group and REFERENCES.group(group))
    return list(evaluate(claims(tmp_path, **fields), columns)[0].sides)


def copy(
    records: Path, name: str, folder: str = "h200-141gb", called: str = "", **changes: object
) -> None:
    """A committed record in another folder, perhaps called otherwise, some of its statements changed."""
    path = records / folder / f"{called or name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    metrics_of(path).write_text(metrics_of(KEPT / f"{name}.json").read_text())
    write_json(path, kept(name) | changes)


def kept(name: str) -> dict:
    return json.loads((KEPT / f"{name}.json").read_text())


# ---- what claims.yaml says


def test_there_are_claims_for_every_chapter_and_all_are_evaluated():
    assert len(ALL) >= 24 and {claim.chapter for claim in ALL} == {100, 200, 300, 400, 500}
    rows = collect_records(RECORDS, REFERENCES).rows
    found = evaluate(ALL, sources(rows, CATALOG, REFERENCES))
    assert all(len(one.sides) >= 2 for one in found)
    for one in found:
        for side in one.sides:
            assert (side.value is None) == (side.verdict in ("not measured", "not asked"))
            assert side.missing or side.verdict != "not measured", one.claim.name


def test_a_claim_belongs_to_the_chapter_of_its_experiments():
    for claim in ALL:
        assert {CATALOG.find(q.of.split()[0]).chapter for q in claim.formula.quantities} & {
            claim.chapter
        }, claim.name


def test_what_stands_in_ran_on_fewer_gpus():
    for claim in (claim for claim in ALL if len(claim.expressions) > 1):
        whole, half = (
            [CATALOG.find(q.of.split()[0]).world_size for q in e.quantities]
            for e in claim.expressions
        )
        assert sum(half) < sum(whole), claim.name


def test_reasons_are_about_claims_that_exist():
    names = {claim.name for claim in ALL}
    for claim in ALL:
        for reason in claim.reason.values():
            mentioned = {
                word.strip("(),;:.") for word in reason.split() if "-" in word and "=" not in word
            }
            like_claims = {
                word
                for word in mentioned
                if word.split("-")[0] in {name.split("-")[0] for name in names}
            }
            assert like_claims <= names, claim.name


# ---- how a formula is read


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("step_ms[101] / step_ms[104]", 2.0),
        ("(step_ms[101] - step_ms[104]) * 2", 8.0),
        ("-step_ms[104] + 8", 4.0),
        ("min(step_ms[101], step_ms[104], step_ms[111])", 4.0),
        (
            "median(step_ms[101], step_ms[104], step_ms[111]) / max(step_ms[104], step_ms[111])",
            8 / 16,
        ),
        ("step_ms[ 101 ] * 1e3", 8000.0),
    ],
)
def test_arithmetic(text, value):
    assert (
        parse(text).value(lambda quantity: {"101": 8.0, "104": 4.0, "111": 16.0}[quantity.of])
        == value
    )


def test_brackets_hold_what_one_types_after_make():
    formula = parse("""step_ms[101] / step_ms[101 CARD=h100-80gb ARGS="--lr '1'"]""")
    assert formula.quantities == (
        Quantity("step_ms", "101"),
        Quantity("step_ms", """101 CARD=h100-80gb ARGS="--lr '1'\""""),
    )


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "step_ms.__class__",
        "[1, 2]",
        "step_ms[101][0]",
        "(lambda: 1)()",
        "open[1]()",
        "step_ms[101] ** 9 ** 9",
        "step_ms[101] < 3",
        "x",
        "True",
        "'a'",
        "1e999",
        "min()",
        "min(*step_ms[101])",
        "f(1)",
        "",
        "step_ms[101] if 1 else 2",
        "1 +",
        "step_ms[101]; step_ms[104]",
        "\0",
        "(" * 300 + "1" + ")" * 300,
        "-" * 9999 + "1",
        "step_ms[101] or 1",
        "step_ms[a[101]]",
        "{}",
        "f'{1}'",
        "step_ms[101]@step_ms[101]",
    ],
)
def test_anything_else_is_refused_and_nothing_is_run(text):
    with pytest.raises(UserError, match=r"no arithmetic over quantities such as step_ms\[401\]"):
        parse(text)


def test_division_by_zero_is_told():
    with pytest.raises(UserError, match="divides by zero"):
        parse("step_ms[101] / (step_ms[104] - step_ms[104])").value(lambda quantity: 1.0)


@pytest.mark.parametrize(
    ("text", "unit"),
    [
        ("step_ms[101]", "ms"),
        ("step_ms[101] / step_ms[104]", "1"),
        ("memory_gib[101] - state_gib[101]", "GiB"),
        ("tokens_per_s[101] * step_ms[101]", "ms tokens/s"),
        ("memory_gib[101] / step_ms[101] / step_ms[101]", "GiB/ms^2"),
        ("(step_ms[101] / step_ms[104]) - bubble[408]", "1"),
        ("max(memory_gib[101], reserved_gib[104])", "GiB"),
    ],
)
def test_units_follow_from_quantities(text, unit):
    assert spell(parse(text).unit(unit_of)) == unit


# ---- mistakes


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"formula": "step_ms[101] + memory_gib[101]", "must": "< 1"},
            "mixes units: step_ms[101] is in ms, memory_gib[101] in GiB",
        ),
        ({"formula": "min(step_ms[101], memory_gib[104])", "must": "< 1"}, "mixes units"),
        (
            {"formula": "step_ms[101] / step_ms[104] - step_ms[101]"},
            "mixes units: step_ms[101] / step_ms[104] is in 1",
        ),
        (
            {"formula": "memory_gib[101] - memory_gib[104]"},
            "the formula is in GiB, but what must hold, < 0.9, in 1",
        ),
        ({"must": "< 0.9 GiB"}, "the formula is in 1, but what must hold, < 0.9 GiB, in GiB"),
        ({"must": "< 0.9 GB"}, "unknown unit GB; did you mean GiB"),
        ({"must": "smaller"}, "must: smaller: expected < 0.9, > 1.5 GiB, = 1 or 0.9 .. 1.1"),
        ({"must": "2 .. 1"}, "the first number is the larger one"),
        ({"formula": "memory_gib[407] / memory_gib[408]"}, "it: no experiment 407; nearest ids"),
        (
            {"formula": "memory_gb[101] / memory_gb[104]"},
            "unknown quantity memory_gb; did you mean memory_gib",
        ),
        (
            {"formula": "memory_gib[101 CRAD=h100-80gb] / 2"},
            "unknown setting CRAD; did you mean CARD",
        ),
        ({"formula": "memory_gib[101 CARD=h100] / memory_gib[101]"}, "CARD=h100: unknown GPU"),
        ({"formula": "memory_gib[101 'x] / memory_gib[101]"}, "No closing quotation"),
        ({"formula": "memory_gib[] / memory_gib[101]"}, "no experiment"),
        ({"formula": "1 + 1"}, "names no experiment"),
        ({"formula": "eval(1)"}, "no function eval"),
        ({"chapter": 150}, "no chapter 150"),
        ({"or": "half"}, "no experiment 115h"),
        ({"or": {"104": "101"}}, "or: 104 is not in the formula"),
        ({"or": {"115": "407"}}, "no experiment 407"),
        ({"or": "double"}, "it: or"),
        ({"resaon": {}}, "unknown key 'resaon'; did you mean reason"),
        ({"reason": {"theirs": "x"}}, "reason"),
        ({"says": ""}, "says"),
        ({"chapter": "100"}, "chapter = '100': input should be a valid integer"),
    ],
)
def test_a_wrong_claim_is_refused(tmp_path, fields, message):
    with pytest.raises(UserError) as caught:
        claims(tmp_path, **fields)
    assert message in str(caught.value) and str(caught.value).startswith("claims.yaml: it: ")


@pytest.mark.parametrize(
    "text", ["- 1\n", "a: [", "a: 1\n", "a: {chapter: 100}\na: {chapter: 100}\n"]
)
def test_a_file_that_is_something_else_is_refused(tmp_path, text):
    path = tmp_path / "claims.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"claims\.yaml"):
        load_claims(CATALOG, path)


# ---- when it holds


@pytest.mark.parametrize(
    ("low", "high", "value", "spread", "verdict"),
    [
        (-float("inf"), 0.9, 0.8, 0.05, "holds"),
        (-float("inf"), 0.9, 0.88, 0.05, "undecided"),
        (-float("inf"), 0.9, 0.92, 0.05, "undecided"),
        (-float("inf"), 0.9, 1.0, 0.05, "fails"),
        (-float("inf"), 0.9, 0.9, 0.0, "fails"),  # < is strict
        (0.9, float("inf"), 0.9, 0.0, "fails"),
        (0.9, 1.1, 1.1, 0.0, "holds"),  # .. is not
        (0.9, 1.1, 1.0, 0.05, "holds"),
        (0.9, 1.1, 1.0, 0.5, "undecided"),  # wider than what must hold
        (0.9, 1.1, 1.3, 0.1, "fails"),
        (1.0, 1.0, 1.0, 0.0, "holds"),
        (1.0, 1.0, 0.0, 0.0, "fails"),
        (0.3, 0.3, 0.1 + 0.2, 0.0, "holds"),  # = but for rounding
    ],
)
def test_a_verdict_reaches_as_far_as_the_spread(low, high, value, spread, verdict):
    assert Bound("", low, high, ()).judge(value, spread) == verdict


def test_ours_and_published_stand_side_by_side(tmp_path):
    ours, published = sides(tmp_path, formula="step_ms[112] / (4 * step_ms[111])", must="< 1")
    medians = {name: kept(name)["step_ms"]["median"] for name in ("111", "112")}
    assert ours.value == pytest.approx(medians["112"] / 4 / medians["111"])
    assert (published.value, published.spread, published.verdict) == (
        pytest.approx(1470 / 4 / 393),
        0,
        "holds",
    )
    assert published.numbers == {Quantity("step_ms", "112"): 1470, Quantity("step_ms", "111"): 393}


def test_the_spread_is_twice_the_uncertainty_carried_through_the_formula(tmp_path):
    ours, _ = sides(tmp_path, formula="step_ms[104] / step_ms[101]", must="> 1")
    relative = []
    for name in ("104", "101"):
        steps = [
            json.loads(line)["step_ms"]
            for line in metrics_of(KEPT / f"{name}.json").read_text().splitlines()
        ][5:]
        relative.append(step_noise_ms(steps) / kept(name)["step_ms"]["median"])
    assert ours.spread == pytest.approx(
        2 * ours.value * (relative[0] ** 2 + relative[1] ** 2) ** 0.5, rel=0.02
    )
    memory, _ = sides(tmp_path, formula="allocated_gib[114] - allocated_gib[115]", must="> 13 GiB")
    assert (memory.spread, memory.verdict) == (0, "holds")


def test_a_difference_inside_the_spread_is_undecided(tmp_path):
    copy(tmp_path / "records", "211")
    copy(tmp_path / "records", "211", called="231", experiment=kept("231")["experiment"])
    ours, _ = sides(
        tmp_path, tmp_path / "records", formula="step_ms[211] / step_ms[231]", must="< 1"
    )
    assert (ours.verdict, ours.value) == ("undecided", 1) and ours.spread > 0.01


def test_a_failing_claim_is_shown_with_its_reason_and_is_no_error(tmp_path, capsys):
    found = claims(tmp_path, must="> 1", reason={"ours": "the optimizer is sharded"})
    columns = sources(collect(tmp_path, RECORDS, REFERENCES).rows, CATALOG, REFERENCES)
    for format in ("terminal", "markdown", "json"):
        text = render(evaluate(found, columns), format)
        assert "fails" in text and "the optimizer is sharded" in text
        assert ("in place of the formula's" in text) == (format == "markdown")
    assert "because" not in render(evaluate(claims(tmp_path), columns))
    assert main(["claims"]) == 0
    assert "fails" in capsys.readouterr().out


# ---- what it is never evaluated on


def test_what_is_missing_is_named(tmp_path):
    ours, published = sides(tmp_path, formula="step_ms[219] / step_ms[101]", must="< 1")
    assert (ours.verdict, ours.missing) == ("not measured", ("219",))
    assert (published.verdict, published.missing) == ("not measured", ("219",))
    ours, _ = sides(tmp_path, formula="step_ms[121 CARD=h100-80gb] / step_ms[101]", must="< 1")
    assert ours.missing == ("121 CARD=h100-80gb (ran out of memory: no step_ms)",)
    _, published = sides(tmp_path)
    assert published.missing == ("115 (what ran is in doubt)",)


def test_stand_ins_are_taken_together_where_the_experiments_are_not_measured(tmp_path):
    fields = {
        "formula": "step_ms[128] / step_ms[118]",
        "must": "0.5 .. 1.5",
        "or": {128: 124, 118: 114},
    }
    copy(tmp_path / "records", "114")
    ours, _ = sides(tmp_path, tmp_path / "records", **fields)
    assert (ours.verdict, ours.missing) == ("not measured", ("128", "118", "or 124"))
    copy(tmp_path / "records", "124")
    ours, published = sides(tmp_path, tmp_path / "records", **fields)
    assert [quantity.of for quantity in ours.numbers] == ["124", "114"]
    assert [quantity.of for quantity in published.numbers] == ["128", "118"]


def test_half_size_companions_stand_in(tmp_path):
    (claim,) = claims(
        tmp_path, formula="fits[282] - fits[281 CARD=h100-80gb]", must="= 1", **{"or": "half"}
    )
    assert [quantity.of for quantity in claim.expressions[1].quantities] == [
        "282h",
        "281h CARD=h100-80gb",
    ]


def test_no_claim_mixes_hardware_or_upstream(tmp_path):
    records = tmp_path / "records"
    copy(records, "115")
    copy(records, "114", folder="h100-80gb", gpu="NVIDIA H100 80GB HBM3")
    one, other, _ = sides(tmp_path, records)
    assert {one.verdict, other.verdict} == {"not measured"}
    assert {one.missing, other.missing} == {("114",), ("115",)}
    older = kept("114")["upstream"] | {"version": "0.14.0"}
    copy(records, "114", upstream=older)
    assert [side.verdict for side in sides(tmp_path, records)] == ["not measured"] * 4
    copy(records, "114")
    assert "holds" in [side.verdict for side in sides(tmp_path, records)]


def test_a_record_of_other_arguments_another_card_or_a_miniature_is_another_experiment(tmp_path):
    records, formula = tmp_path / "records", 'step_ms[101 ARGS="--lr 1e-4"] / step_ms[101]'
    copy(records, "101")
    experiment = kept("101")["experiment"]
    ours, published = sides(tmp_path, records, formula=formula, must="0.9 .. 1.1")
    assert ours.missing == published.missing == ('101 ARGS="--lr 1e-4"',)
    for args, verdict in (("--lr 2e-4", "not measured"), ("--lr 1e-4", "holds")):
        changed = experiment | {"extra_args": args.split(), "overrides": {"ARGS": args}}
        copy(records, "101", called="101_args", experiment=changed)
        assert sides(tmp_path, records, formula=formula, must="0.9 .. 1.1")[0].verdict == verdict
    copy(records, "101", experiment=experiment | {"miniature": True})
    assert sides(tmp_path, records, formula=formula, must="0.9 .. 1.1")[0].missing == ("101",)


@pytest.mark.parametrize(
    ("formula", "value"),
    [
        ("fits[122]", 1),  # uses less than the published card has
        ("fits[121 CARD=h100-80gb]", 0),
        ("fits[111 CARD=h100-80gb]", 1),
        ("fits[121]", None),
    ],
)
def test_whether_it_fits_the_published_card(tmp_path, formula, value):
    for name in ("122", "121_cardh100-80gb", "111_cardh100-80gb"):
        copy(tmp_path / "records", name)
    ours, published = sides(tmp_path, tmp_path / "records", formula=formula, must="= 1")
    assert ours.value == value
    assert published.value == (0 if "121" in formula else 1)


@pytest.mark.parametrize(
    "used", [{"nvml": 100.0}, {"nvml": 79.4, "driver": 0.6}]
)  # of an H100's 79.6 GiB
def test_more_memory_than_the_published_card_has_says_nothing(tmp_path, used):
    """122 on an H200, had it used 100 GiB: a card that cannot give so much might have done with less."""
    memory = {"allocated": 62.3, "reserved": 69.6, **used}
    copy(tmp_path / "records", "122", memory_gib=memory)
    ours, _ = sides(tmp_path, tmp_path / "records", formula="fits[122]", must="= 1")
    assert "CARD= emulates the published one" in ours.missing[0]


def test_a_time_measured_beside_other_runs_says_so(tmp_path):
    copy(tmp_path / "records", "111", packed_with=["112-a", "101-b"])
    copy(tmp_path / "records", "112")
    packed = "111 shared its node with 2 runs"
    assert sides(tmp_path, tmp_path / "records", formula="step_ms[112] / step_ms[111]", must="> 1")[
        0
    ].remarks == (packed,)
    assert (
        sides(
            tmp_path, tmp_path / "records", formula="memory_gib[112] / memory_gib[111]", must="> 1"
        )[0].remarks
        == ()
    )
    found = claims(tmp_path, formula="step_ms[112] / step_ms[111]", must="> 1")
    columns = sources(collect(tmp_path, tmp_path / "records", REFERENCES).rows, CATALOG, REFERENCES)
    assert all(
        packed in render(evaluate(found, columns), form)
        for form in ("terminal", "markdown", "json")
    )


def test_a_claim_about_ours_and_published_is_not_asked_of_the_published_table(tmp_path):
    ours, published = sides(tmp_path, formula="memory_ratio[111]", must="0.9 .. 1.1")
    assert (ours.verdict, published.verdict, published.value) == ("holds", "not asked", None)
    ours, _ = sides(
        tmp_path, formula="published_memory_gib[111] - memory_gib[111]", must="> -1 GiB"
    )
    assert ours.value == pytest.approx(76.7 - kept("111")["memory_gib"]["nvml"])


def test_rates_of_the_published_table_follow_from_its_step_time(tmp_path):
    _, published = sides(tmp_path, formula="tflops[111]", must="> 1 TFLOP/s")
    counted = (
        kept("111")["tflops"] * kept("111")["step_ms"]["median"]
    )  # as upstream counted 111's steps
    assert published.value == pytest.approx(counted / 393, rel=1e-3)
    _, tokens = sides(tmp_path, formula="tokens_per_s[111]", must="> 1 tokens/s")
    assert tokens.value == pytest.approx(15 * 1024 / 0.393)


def test_another_group_of_references_can_stand_beside(tmp_path):
    _, other = sides(tmp_path, group="h200-8gpu", formula="step_ms[438] / step_ms[408]", must="< 1")
    assert other.value == pytest.approx(738.9 / 1093)


def test_claims_and_documents_read_the_same_expressions(tmp_path):
    """Documents refused settings in brackets, and claims refused references."""
    facts = Facts.load(RECORDS)
    with pytest.raises(RanOutOfMemory):
        facts.value("step_ms[121 CARD=h100-80gb]")
    capped = kept("111_cardh100-80gb")["step_ms"]["median"]
    assert facts.value("step_ms[111 CARD=h100-80gb]") == capped
    formula = "step_ms[111] / step_ms[h200-4gpu, 111]"
    ours, published = sides(tmp_path, formula=formula, must="0.9 .. 1.1")
    assert ours.value == facts.value(formula) == kept("111")["step_ms"]["median"] / 376.3
    assert (ours.verdict, published.verdict) == ("holds", "not asked")
    with pytest.raises(UserError, match="it: no references called h200-9gpu"):
        claims(tmp_path, formula="step_ms[111] / step_ms[h200-9gpu, 111]")
    with pytest.raises(UserError, match=r"it: \[h200-4gpu, 999, without variant\]: 0 rows"):
        claims(tmp_path, formula="step_ms[111] / step_ms[h200-4gpu, 999]")
    with pytest.raises(UserError, match="mixes units"):
        facts.value("step_ms[101] + memory_gib[101]")


def test_what_stands_in_leaves_references_alone(tmp_path):
    fields = {"formula": "step_ms[401] / step_ms[h200-8gpu, 408]", "must": "> 0", "or": "half"}
    (claim,) = claims(tmp_path, **fields)
    assert [one.of for one in claim.expressions[1].quantities] == ["401h", "h200-8gpu, 408"]


# ---- as people read it


def test_the_markdown_form_has_a_table_for_each_chapter(capsys):
    assert main(["claims", "FORMAT=markdown", "HARDWARE=h200-141gb"]) == 0
    text = capsys.readouterr().out
    assert (
        text.count("| claim | must hold |") == 5
        and "| claim | must hold | ours | published |" in text
    )
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("| claim")]
    assert all(line.count(" | ") == table[0].count(" | ") for table in tables for line in table)
    assert main(["claims", "CHAPTER=400", "FORMAT=markdown"]) == 0
    assert capsys.readouterr().out.startswith("**400 Pipeline parallelism")


def test_the_json_form_has_every_number(capsys):
    assert main(["claims", "CHAPTER=100", "FORMAT=json", "HARDWARE=h200-141gb"]) == 0
    found = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
    ours, published = found["accumulation-time"]["sides"]
    assert (ours["source"], published["source"], ours["verdict"]) == ("ours", "published", "holds")
    assert published["numbers"][0] == {
        "quantity": "step_ms",
        "of": "112",
        "value": 1470.0,
        "unit": "ms",
    }


def test_claims_are_evaluated_without_torch():
    code = "import sys; from harness.cli import main; main(['claims']); assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["CHAPTER=150"], "no claims of chapter 150"),
        (["CHAPTER=x"], "no claims of chapter x"),
        (["FORMAT=csv"], "FORMAT=csv; valid: terminal, markdown, json"),
        (["HARDWARE=b200"], "no run of hardware b200"),
        (["AGAINST=nothing"], "no references called nothing"),
        (["CHAPTRE=100"], "unknown setting CHAPTRE"),
    ],
)
def test_mistakes_are_told(capsys, words, message):
    assert main(["claims", *words]) == 2
    assert message in capsys.readouterr().err


def test_the_file_is_where_the_documents_say():
    assert CLAIMS == ROOT / "experiments" / "claims.yaml"
