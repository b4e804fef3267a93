"""What GPUs build, Transformer Engine's layers, of every row of the catalogue; where there is no GPU, on the meta device."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from harness.convert.architectures import ARCHITECTURES
from harness.convert.transforms import Sizes
from harness.experiment.catalog import load_catalog
from harness.predict.flops import adapter_parameters, parameters_on

CATALOG = load_catalog()
ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(
        not find_spec("transformer_engine"), reason="no Transformer Engine: scripts/setup.sh gpu"
    ),
]


@pytest.fixture(scope="module")
def upstream(tmp_path_factory):
    """What upstream's parser and builder make of every row's GPU script (tests/build_with_te.py)."""
    result = tmp_path_factory.mktemp("te") / "found.json"
    command = [sys.executable, str(ROOT / "tests" / "build_with_te.py"), str(result)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(result.read_text())


def test_upstream_builds_every_row(upstream):
    assert {id_: found for id_, found in upstream.items() if isinstance(found, str)} == {}
    assert set(upstream) == {e.id for e in CATALOG.experiments}


def test_ranks_hold_what_the_formulas_say(upstream):
    for id_, stages in upstream.items():
        e = CATALOG.find(id_)
        for stage, found in stages.items():
            formula = parameters_on(e, int(stage))
            assert found["weights"] == formula.dense + formula.experts, (id_, stage)
            assert e.ep == 1 or found["experts"] == formula.experts, (id_, stage)
            assert found["adapters"] == adapter_parameters(e), (id_, stage)


@pytest.mark.parametrize(
    ("architecture", "id_"),
    [
        ("GPT2LMHeadModel", "601"),
        ("LlamaForCausalLM", "611"),
        ("GptOssForCausalLM", "620"),
        ("OlmoeForCausalLM", "631"),
    ],
)
def test_imported_weights_have_all_that_these_layers_load(upstream, architecture, id_):
    from harness.convert.importing import states

    model = CATALOG.find(id_).model
    imported = {
        key
        for row in ARCHITECTURES[architecture].rows_of(model)
        for key in (row.megatron, *row.also)
    }
    imported |= {key.partition("/")[0] for key in states(Sizes(model, 1, model.vocab_size))}
    wanted = set(upstream[id_]["0"]["keys"])
    assert "decoder.layers.self_attention.linear_qkv.layer_norm_weight" in wanted
    assert wanted <= imported
