"""Rules of documents, one by one, and the file that they stand in."""
# ruff: noqa: RUF001

import random
import unicodedata
from pathlib import Path

import pytest

np = pytest.importorskip("numpy", reason="needs numpy")
pytest.importorskip("orjson", reason="needs orjson")

from harness.data.clean.documents import Alphabet, Language, Length, Normalise, OneLine, Repetition  # noqa: E402
from harness.data.clean.rules import load_rules  # noqa: E402
from harness.errors import UserError  # noqa: E402

SWEDISH = Path(__file__).parent.parent / "data" / "rules-sv.yaml"


@pytest.fixture(scope="module")
def swedish():
    return load_rules(SWEDISH)


def rule(rules, kind):
    return next(rule for rule in rules.all if isinstance(rule, kind))


def strings(seed, number=300):
    """Strings of characters from all planes, plain and odd ones mixed."""
    generator = random.Random(seed)
    odd = "åäöÅÄÖéü \t\n\r\0\x1f\x85\xa0\xad\u0308\u030a\u200b\u2028\u202e\ufeff\ufffdÃ¤Ã¥Â â€™жшⅳﬁ漢字한e\u0301"
    for _ in range(number):
        yield "".join(
            generator.choice(odd)
            if generator.random() < 0.5
            else chr(generator.choice([*range(0x20, 0x7F), *range(0xA0, 0x500), 0x1F600, 0x10FFFF]))
            for _ in range(generator.randrange(40))
        )


def test_swedish_rules_in_order(swedish):
    assert swedish.names == (
        "unreadable",
        "normalise",
        "one-line",
        "length",
        "language",
        "alphabet",
        "repetition",
        "exact-duplicates",
        "near-duplicates",
    )
    assert (rule(swedish, Language).name, rule(swedish, Language).above) == ("Swedish", 0.95)


def test_rules_dump_and_load_again(swedish, tmp_path):
    import yaml

    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump({"rules": swedish.dump()}))
    assert load_rules(path) == swedish


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "rules: [lenght: {min_characters: 1, max_characters: 2}]",
            "no rule 'lenght'; did you mean length?",
        ),
        (
            "rules: [length: {min_character: 1, max_characters: 2}]",
            "unknown key 'min_character'; did you mean min_char",
        ),
        ("rules: [length: {max_characters: 2}]", "length: 'min_characters' is missing"),
        (
            "rules: [length: {min_characters: many, max_characters: 2}]",
            "length: min_characters = 'many'",
        ),
        ("rules: [length: {min_characters: 0, max_characters: 2}]", "min_characters = 0"),
        (
            "rules: [length: {min_characters: 3, max_characters: 2}]",
            "min_characters 3 is above max_characters 2",
        ),
        ("rules: [length: 5]", "length: expected key: value pairs, found 5"),
        ("rules: [5]", "5 is no rule"),
        ("rules: [{one-line: {}, length: {}}]", "is no rule"),
        (
            "rules: [language: {name: Swedisch, above: 0.9}]",
            "no language 'Swedisch' in lid.176; did you mean Swedish",
        ),
        ("rules: [language: {name: no, above: 0.9}]", "name = False"),
        ("rules: [language: {name: Swedish, above: 95}]", "above = 95"),
        ("rules: [language: {name: Swedish, above: .nan}]", "above = nan"),
        (
            "rules: [alphabet: {allow: [abc], drop_above: 0.1}]",
            "'abc' is neither a character nor a range",
        ),
        ("rules: [alphabet: {allow: [z-a], drop_above: 0.1}]", "'z-a' is empty"),
        ("rules: [alphabet: {allow: [U+110000], drop_above: 0.1}]", "Unicode ends at"),
        ("rules: [alphabet: {allow: [], drop_above: 0.1}]", "allow = []"),
        ("rules: [exact-duplicates, one-line]", "come last"),
        ("rules: [one-line, one-line]", "one-line occurs 2 times"),
        ("rules: {one-line: {}}", "with a list of rules"),
        ("rule: []", "one key, rules"),
        ("rules: [", "is not valid YAML"),
        ("- rules", "expected key: value pairs, found ['rules']"),
    ],
)
def test_wrong_rules_say_what_and_where(text, message, tmp_path):
    path = tmp_path / "rules-xy.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_rules(path)
    assert message in str(error.value)
    assert "rules-xy.yaml" in str(error.value)


def test_missing_rules_name_those_that_exist(tmp_path):
    with pytest.raises(UserError, match="rules-sv"):
        load_rules(SWEDISH.with_name("rules-se.yaml"))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("fo\u0308r A\u030angstro\u0308m", "för Ångström"),
        ("soft\u00adhy\u200bphen \ufeff\x00NUL\x1b", "softhyphen NUL"),
        ("fÃ¶r att gÃ¥ Ã¤ndÃ¥", "för att gå ändå"),
        ("Ã\x85ngstrÃ¶m, Ã…r", "Ångström, År"),
        ("Â«citatÂ» â€“ itâ€™s â‚¬5 â„¢", "«citat» – it’s €5 ™"),
        ("Ã\u200b¥r", "år"),
        ("”Å” och ”kafé”… och Ä”", "”Å” och ”kafé”… och Ä”"),
        ("rad\tett\nrad två", "rad\tett\nrad två"),
    ],
)
def test_normalise(before, after, swedish):
    assert rule(swedish, Normalise).apply([before]).texts == [after]


def test_normalise_is_done_after_once(swedish):
    normalise = rule(swedish, Normalise)
    once = normalise.apply(list(strings(1))).texts
    assert normalise.apply(once).texts == once
    assert all(unicodedata.is_normalized("NFC", text) for text in once)
    assert not [text for text in once if normalise._removed.search(text)]


def test_normalise_keeps_what_needs_nothing(swedish):
    text = "Räksmörgås à la carte – ”fem” euro: 5 €."
    assert rule(swedish, Normalise).apply([text]).texts[0] is text


def test_nfkc_reaches_below_300():
    normalise = Normalise(form="NFKC", mend_mojibake=False, remove=("U+0000",))
    assert normalise.apply(["m², ﬁn", "Ã¤"]).texts == ["m2, fin", "Ã¤"]


def test_one_line_is_split_and_join():
    texts = [*strings(2), "a\n\nb", " a  b ", "a\u2028b\x85c\r\nd", "", " ", "a b"]
    assert OneLine().apply(texts).texts == [" ".join(text.split()) for text in texts]


def test_length():
    outcome = Length(min_characters=2, max_characters=3).apply(["å", "ää", "ååå", "ööööö"])
    assert outcome.texts == ["ää", "ååå"]
    assert outcome.dropped == {0: "1 characters", 3: "5 characters"}


def test_repetition_drops_menus_not_prose(swedish):
    prose = (
        "Under sommaren vandrade de längs kusten, sov i tält och lagade mat över öppen eld. När hösten kom flyttade de "
        "in till staden igen, där barnen började skolan och föräldrarna gick tillbaka till sina arbeten på sjukhuset."
    )
    outcome = rule(swedish, Repetition).apply(
        [prose, "Hem Om oss Kontakt Kundvagn Logga in " * 30, ""]
    )
    assert prose in outcome.texts
    assert 1 in outcome.dropped


def test_alphabet_leaves_only_its_characters(swedish):
    alphabet = rule(swedish, Alphabet)
    texts = [*strings(3), *("x" * 1000 + text for text in strings(4))]
    outcome = alphabet.apply(texts)
    assert len(outcome.texts) + len(outcome.dropped) == len(texts)
    assert outcome.dropped
    assert len(outcome.texts) > 200
    assert not [text for text in outcome.texts if alphabet._other.search(text)]


def test_alphabet_states_its_share(swedish):
    alphabet = rule(swedish, Alphabet)
    latin = "Åke Ärlig, Örjan Éclair & Søren Łukasz-Škvorecký: 100 % – “så” … £ € ½ №"
    few, many = "x" * 98 + "жш", "x" * 97 + "жшы"
    outcome = alphabet.apply([latin, few, many])
    assert outcome.texts == [latin, "x" * 98]
    assert outcome.dropped == {2: "3.0% other characters: жшы"}
