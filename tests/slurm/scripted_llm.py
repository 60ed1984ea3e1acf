"""The tests' language model as a program: `python -m tests.slurm.scripted_llm PORT LOG [seconds it lives]`.

Its answer to a caption is one sub-caption, the caption itself. LOG gets a line a request: the key, and the model.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.integration.llm_server import Reply, answer, serve


def script(caption: str) -> Sequence[Reply]:
    return [answer(("morphology", caption))]


def main(port: int, log_path: Path, lives_s: float) -> None:
    print("the scripted server starts", flush=True)
    ends_at, num_told = time.monotonic() + lives_s, 0
    with serve(script, port) as server, log_path.open("a", encoding="utf-8") as log:
        while time.monotonic() < ends_at:
            for headers, body in list(zip(server.headers, server.bodies, strict=False))[num_told:]:
                print(headers["authorization"], body["model"], file=log, flush=True)
                num_told += 1
            time.sleep(0.05)
    sys.exit("the scripted server is gone")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]) if len(sys.argv) > 3 else 600.0)
