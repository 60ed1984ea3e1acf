"""img2dataset on local files. Run by the Python of its own environment (`img2dataset_env.python_path`), which has none
of our modules: `python img2dataset_run.py '{"url_list": ..., "output_folder": ..., ...}'`, the arguments of `download`.

Prints one JSON object: seconds of the whole call; seconds from the first worker's start of work to the last one's end,
without the start of its processes and the last poll of its logger; images written.
"""

import json
import sys
import time
from pathlib import Path

from img2dataset import download


def main() -> None:
    arguments = json.loads(sys.argv[1])
    start_s = time.perf_counter()
    download(**arguments)
    whole_s = time.perf_counter() - start_s
    stats = [json.loads(path.read_text()) for path in Path(arguments["output_folder"]).glob("*_stats.json")]
    work_s = max(shard["end_time"] for shard in stats) - min(shard["start_time"] for shard in stats)
    num_images = sum(shard["successes"] for shard in stats)
    print(json.dumps({"whole_s": whole_s, "work_s": work_s, "num_images": num_images}))


if __name__ == "__main__":  # its worker processes import this file
    main()
