"""A configuration of ours as a Flower app's run config."""

from pathlib import Path

from fedmomentum.config.schema import Config
from fedmomentum.config.toml import to_dict

EXAMPLE = Path(__file__).parents[2] / "examples" / "flower-app"


def flat(config: Config, out: Path, **more) -> dict:
    """A configuration as a run config, its data apart, which is each node's own."""
    values = {"out": str(out), "num-clients": 2, "resume": False}
    for section, table in to_dict(config).items():
        for key, value in table.items():
            if f"{section}.{key}" == "data.client-files" or value in ({}, []):
                continue
            value = str(value).replace("'", '"') if isinstance(value, list) else value
            values[f"{section}.{key}"] = value
    return values | {key.replace("__", ".").replace("_", "-"): v for key, v in more.items()}
