"""Every family of models trains and exports, or is refused by name, as its record says."""

from pathlib import Path

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fedmomentum.base_model.families import families_page, known_families, untried_families
from tests.families import FAMILIES, NOT_TRIED, run_family

ROOT = Path(__file__).parent.parent
# Those with a mechanism of their own, and those that most people use; the others are as these.
EVERY_TIME = (
    "bart",
    "bert",
    "bloom",
    "deepseek_v3",
    "falcon_mamba",
    "gemma2",
    "gemma3",
    "glm4_moe",
    "glm_moe_dsa",
    "gpt2",
    "gpt_oss",
    "hrm_text",
    "jamba",
    "jetmoe",
    "llama",
    "llama4",
    "mamba",
    "minimax_m2",
    "mistral3",
    "mixtral",
    "nemotron_h",
    "olmoe",
    "phi3",
    "qwen2_moe",
    "qwen3",
    "qwen3_5",
    "qwen3_moe",
    "qwen3_next",
    "recurrent_gemma",
    "rwkv",
    "xlm",
    "zamba",
)
CASES = [
    pytest.param(name, marks=[] if name in EVERY_TIME else [pytest.mark.long]) for name in FAMILIES
]


@pytest.mark.parametrize("family", CASES)
def test_a_family_trains_and_exports_or_is_refused_as_recorded(family, tmp_path):
    known = {record.family: record for record in known_families()}
    assert run_family(family, tmp_path) == known[family], "run: make docs"


def test_the_page_and_the_record_name_every_family():
    names = [record.family for record in known_families()]
    assert names == FAMILIES
    assert untried_families() == NOT_TRIED
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) <= {*names, *NOT_TRIED}
    assert (ROOT / "docs" / "models.md").read_text() == families_page(), "run: make docs"
