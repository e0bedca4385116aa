"""The plan's bytes of a round are those of the tensors that a round sends, whatever the settings.

Of every method as it is by default: `test_methods_in_runs.py`.
"""

import pytest
import torch

from fedmomentum.config.schema import Config
from fedmomentum.run.method import make_method
from fedmomentum.run.traffic import plan_traffic
from tests.run.test_methods_in_runs import num_bytes, recorded, update_bytes
from tests.runs import prepare, start, tiny_config

CASES = [
    ("fedmomentum", {"residual": "carried"}, {}),
    ("fedmomentum", {"residual": "dropped"}, {}),
    ("fedmomentum", {"energy": 0.5}, {}),
    ("fedmomentum", {"merge-every": 3}, {}),
    ("fedmomentum", {}, {"downlink-dtype": "bfloat16", "uplink-dtype": "bfloat16"}),
    ("fedmomentum", {"residual": "carried"}, {"downlink-dtype": "bfloat16"}),
    ("ffalora", {}, {"downlink-dtype": "bfloat16"}),
    ("florist", {"energy": 1.0}, {}),
]


def config_of(folder, name, settings, **sections) -> Config:
    """Three clients at rank 2, and modules of two shapes."""
    lora = {"rank": 2, "lora-alpha": 6.0, "target-modules": ["q_proj", "down_proj"]}
    method = {"name": name, "settings": settings}
    return tiny_config(folder, lora=lora, method=method, **sections)


@pytest.mark.parametrize(("name", "settings", "dtypes"), CASES)
def test_a_round_sends_what_the_plan_says(tmp_path, name, settings, dtypes):
    config = config_of(tmp_path, name, settings, federation={"num_rounds": 3, **dtypes})
    model, seen = recorded(config, tmp_path)
    uplinks, downlinks = [], []
    for server_round, kind, _, objects, reply in seen:
        if kind == "train":
            uplinks.append(update_bytes(reply))
        # The model of a round is first sent for its evaluation; round 0 sends the whole adapter.
        if kind == "evaluate" and server_round > 0:
            downlinks.append(sum(map(num_bytes, objects)))

    method = make_method(config)
    traffic = plan_traffic(config, model.adapter, method, len(config.data.client_files))
    assert max(uplinks) == traffic.uplink
    # The ranks of these residuals depend on the data, so the plan can only bound them.
    is_bound = name == "florist" or settings.get("energy", 1) < 1 or method.exact and dtypes
    if is_bound or "merge-every" in settings:
        assert min(downlinks) <= max(downlinks) <= traffic.downlink
    else:
        assert max(downlinks) == traffic.downlink


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("fedmomentum", 'residual = "carried" none'),
        ("florist", "a lower energy"),
        ("fedexlora", None),
        ("ffalora", None),
    ],
)
def test_only_methods_with_such_settings_are_advised_to_send_less(tmp_path, name, advice):
    config = config_of(tmp_path, name, {}, federation={"num_rounds": 1, "uplink-dtype": "bfloat16"})
    warnings = start(config, tmp_path / "out").plan.warnings
    of_residual = [text for text in warnings if "times the uplink" in text]
    if name == "ffalora":
        assert not of_residual
        return
    (text,) = of_residual
    assert (advice in text) if advice else ("settings" not in text)


def test_the_plan_warns_of_bfloat16_where_it_may_be_emulated(tmp_path, monkeypatch):
    config = config_of(tmp_path, "fedit", {}, model={"dtype": "bfloat16"})
    for is_native in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda native=is_native: native)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        run = prepare(config, tmp_path / str(is_native))
        run.close()
        warned = [text for text in run.plan.warnings if "bfloat16 may be emulated" in text]
        assert bool(warned) is not is_native
