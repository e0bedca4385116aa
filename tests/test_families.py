"""Every family of models trains and exports, or is refused by name, as its record says."""

from pathlib import Path

import pytest
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from fedmomentum.base_model.families import families_page, known_families
from tests import classifier_families
from tests.classifier_families import CLASSIFIERS, run_classifier
from tests.families import FAMILIES, NOT_TRIED, run_family

ROOT = Path(__file__).parent.parent
# Those with a mechanism of their own, and those that most people use; the others are as these.
EVERY_TIME = (
    "bart",
    "bloom",
    "deepseek_v3",
    "gemma2",
    "gpt2",
    "gpt_oss",
    "llama",
    "llama4",
    "mamba",
    "mistral3",
    "mixtral",
    "phi3",
    "qwen3_5",
    "rwkv",
)
CLASSIFIERS_EVERY_TIME = (
    "bert",
    "fnet",
    "llama",
    "modernbert",
    "t5",
)


def cases(names, every_time):
    """The families, of which most are tried only by `make test-long`."""
    return [
        pytest.param(name, marks=[] if name in every_time else [pytest.mark.long]) for name in names
    ]


@pytest.mark.parametrize("family", cases(FAMILIES, EVERY_TIME))
def test_a_family_trains_and_exports_or_is_refused_as_recorded(family, tmp_path):
    known = {record.family: record for record in known_families().families}
    assert run_family(family, tmp_path) == known[family], "run: make docs"


@pytest.mark.parametrize("family", cases(CLASSIFIERS, CLASSIFIERS_EVERY_TIME))
def test_a_classifier_trains_and_exports_or_is_refused_as_recorded(family, tmp_path):
    known = {record.family: record for record in known_families().classifiers}
    assert run_classifier(family, tmp_path) == known[family], "run: make docs"


def test_the_page_and_the_record_name_every_family():
    known = known_families()
    assert [record.family for record in known.families] == FAMILIES
    assert known.not_tried == NOT_TRIED
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) <= {*FAMILIES, *NOT_TRIED}
    assert [record.family for record in known.classifiers] == CLASSIFIERS
    not_tried = known.classifiers_not_tried
    assert not_tried == classifier_families.NOT_TRIED
    assert set(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES) <= {*CLASSIFIERS, *not_tried}
    assert (ROOT / "docs" / "models.md").read_text() == families_page(), "run: make docs"
