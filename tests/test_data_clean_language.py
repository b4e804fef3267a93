"""Language identification: languages by name, whole documents, fastText's probabilities."""
# ruff: noqa: RUF001

import random

import pytest

pytest.importorskip("fasttext", reason="needs fasttext-predict")
pytest.importorskip("orjson", reason="needs orjson")

from harness.data.clean import identification
from harness.data.clean.documents import Language
from harness.data.clean.languages import LANGUAGES, code_of
from harness.errors import UserError

SWEDISH = Language(name="Swedish", above=0.95)

SENTENCES = {
    "Swedish": "Regeringen föreslår att bidraget höjs från och med nästa år, eftersom priserna har stigit mycket.",
    "Danish": "Regeringen foreslår, at tilskuddet hæves fra og med næste år, fordi priserne er steget meget.",
    "Norwegian": "Regjeringen foreslår at tilskuddet økes fra og med neste år, fordi prisene har steget mye.",
    "English": "The government proposes that the allowance be raised from next year, since prices have risen a lot.",
    "German": "Die Regierung schlägt vor, den Zuschuss ab dem nächsten Jahr zu erhöhen, da die Preise gestiegen sind.",
    "Finnish": "Hallitus ehdottaa, että tukea korotetaan ensi vuodesta alkaen, koska hinnat ovat nousseet paljon.",
    "Russian": "Правительство предлагает повысить пособие со следующего года, так как цены сильно выросли.",
    "Chinese": "政府建议从明年起提高补贴，因为物价上涨了很多。",
}


def test_language_tells_swedish_from_its_neighbours():
    outcome = SWEDISH.apply(list(SENTENCES.values()))
    assert outcome.texts == [SENTENCES["Swedish"]]
    assert [why.rsplit(" ", 1)[0] for why in outcome.dropped.values()] == [*SENTENCES][1:]


@pytest.mark.parametrize("name", SENTENCES)
def test_language_by_name(name):
    language = Language(name=name, above=0.5)
    assert language.apply(list(SENTENCES.values())).texts == [SENTENCES[name]]


def test_language_looks_at_the_whole_document():
    head = SENTENCES["Swedish"] + " "
    tail = SENTENCES["English"] + " "
    outcome = SWEDISH.apply([head * 20, head * 20 + tail * 60])
    assert outcome.texts == [head * 20]


def test_languages_have_names_and_codes():
    assert len(LANGUAGES) == len(set(LANGUAGES.values())) == 176
    assert all(
        code_of(name) == code_of(name.upper()) == code_of(code) == code
        for code, name in LANGUAGES.items()
    )
    assert LANGUAGES.get("sv") == "Swedish"
    with pytest.raises(UserError, match="did you mean Norwegian"):
        code_of("norwegain")


def odd_texts():
    """Sentences cut, joined and mixed with characters of all planes, and texts that are hardly one."""
    generator = random.Random(5)
    yield from (
        "",
        " ",
        "x",
        "\u00e5",
        "<>",
        "a" * 3000,
        "\U0001f600" * 9,
        "Ett",
        "ett ETT Ett",
        "a\u00a0b\u3000c",
    )
    for _ in range(600):
        words = " ".join(generator.choices([*SENTENCES.values()], k=3)).split()
        words += [
            "".join(
                chr(generator.choice([*range(33, 0x2000), *range(0x1F300, 0x1F600)]))
                for _ in range(5)
            )
        ] * 2
        generator.shuffle(words)
        yield generator.choice([" ", "  ", "\t", "\x0b", "\r"]).join(
            words[: generator.randrange(1, 60)]
        )


def test_every_text_has_probabilities_that_add_up():
    for text in [*SENTENCES.values(), *odd_texts()]:
        found = identification.probabilities(text)
        assert set(found) <= set(LANGUAGES), text
        assert sum(found.values()) == pytest.approx(1, abs=0.01), text
        assert next(iter(found.values())) == max(found.values()), text


@pytest.mark.parametrize("separator", ["\n", " </s> ", "\0</s>\n</s> "])
def test_the_text_behind_fasttexts_end_of_line_counts(separator):
    joined = SENTENCES["Swedish"] + separator + SENTENCES["English"]
    plain = SENTENCES["Swedish"] + " " + SENTENCES["English"]
    assert identification.probabilities(joined) == identification.probabilities(plain)
    tag = SENTENCES["Swedish"] + "</s>" + SENTENCES["English"]
    assert identification.probabilities(tag) != identification.probabilities(plain)


def test_no_documents():
    assert SWEDISH.apply([]).texts == []


def test_another_model_is_refused(tmp_path, monkeypatch):
    other = tmp_path / "lid.176.ftz"
    other.write_bytes(identification.model_path().read_bytes()[:-1])
    monkeypatch.setattr(identification, "model_path", lambda: other)
    with pytest.raises(UserError, match="that was tested"):
        identification.load_model.__wrapped__()
