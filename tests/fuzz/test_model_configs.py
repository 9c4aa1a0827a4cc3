"""Model configurations that nobody wrote: a small Llama's `config.json` with other values and types."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.model.skeleton import read_skeleton
from tests.helpers.fuzzing import answered, inputs
from tests.helpers.strange import VALUES
from tests.helpers.training import make_place

KEYS = [
    *("architectures", "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"),
    *(
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "hidden_act",
        "rope_parameters",
        "rms_norm_eps",
    ),
    *("tie_word_embeddings", "max_position_embeddings", "attention_bias", "dtype", "auto_map", "text_config"),
    *("pad_token_id", "quantization_config", "initializer_range", "rope_scaling", "layer_types"),
]
SIZES = st.sampled_from(
    [0, -1, 1, 3, 100_000, 2**31, 2**40, 2**63, 1.5, "8", None, True, [], {}, "mamba", "gpt2"]
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("base"), records=1).model


@pytest.fixture(scope="module")
def config(model: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((model / "config.json").read_text())
    return read


@inputs(few=60, many=3_000)
@given(st.dictionaries(st.sampled_from(KEYS), SIZES | VALUES, min_size=1, max_size=2))
def test_other_values(model: Path, config: dict[str, Any], values: dict[str, Any]) -> None:
    (model / "config.json").write_text(json.dumps(config | values))
    answered(lambda: read_skeleton(str(model), ("all-linear",), 1), seconds=60)
