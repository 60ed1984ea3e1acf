"""What `caption_array.sbatch` asks of a data config.

`python slurm/local_llm.py CONFIG PORT [key.path=value ...]` prints the model to serve, then the overrides that point
the client at the server on this machine, one a line.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from data_prep.config import LLMOptions, PrepareConfig
from data_prep.config_file import load_config
from data_prep.errors import InputError

KEY_VARIABLE = "DERMVLP_LLM_KEY"


def local_llm(config_path: str, port: int, overrides: Sequence[str]) -> list[str]:
    """The model, then overrides. Raises InputError where the config names no model, or two."""
    config = load_config(config_path, overrides, PrepareConfig)
    parts = {"describer": config.describer, "decomposer": config.decomposer}
    models = {part: options.model for part, options in parts.items() if isinstance(options, LLMOptions)}
    if not models:
        raise InputError(f"{config_path}: names no model to serve; set decomposer.kind to llm, or a describer")
    if len(set(models.values())) > 1:
        raise InputError(
            f"{config_path}: names {' and '.join(models.values())}, and a job serves one model; let describer and "
            "decomposer name the same one, or start servers by hand and use slurm/prepare_array.sbatch"
        )
    lines = [next(iter(models.values()))]
    for part in models:
        lines += [f"{part}.base_url=http://127.0.0.1:{port}/v1", f"{part}.api_key_env={KEY_VARIABLE}"]
    return lines


if __name__ == "__main__":
    try:
        print("\n".join(local_llm(sys.argv[1], int(sys.argv[2]), sys.argv[3:])))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
