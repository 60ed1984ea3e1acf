"""Preparing again: after a kill, after damage, with other settings, by any number of processes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data_prep.config import PrepareConfig, SyntheticSource
from data_prep.config_file import dump_yaml
from data_prep.errors import InputError
from data_prep.prepare import prepare
from data_prep.schema import Aspect, ShardManifest
from data_prep.shards.manifest import verify
from tests.integration.llm_server import Reply, answer, serve
from tests.integration.tables import plain_rows, published, samples, shard_times, table_config, write_image, write_table

REPOSITORY = Path(__file__).resolve().parents[2]
SALT = "a secret of these tests"
RUN = "import sys; from pretrain.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture(autouse=True)
def salt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DERMVLP_SALT", SALT)


def synthetic_config(out_dir: Path, **changes: Any) -> PrepareConfig:
    source = SyntheticSource(num_train=160, num_val=20, image_px=64)
    values = {"name": "synthetic", "source": source, "samples_per_shard": 8, "num_workers": 2, "out_dir": out_dir}
    return PrepareConfig.model_validate(values | changes)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out_dir = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DERMVLP_SALT", SALT)
        prepare(synthetic_config(out_dir))
    return out_dir


@pytest.fixture
def finished(uninterrupted: Path, tmp_path: Path) -> Path:
    """A copy, with its times, that the test may change."""
    return Path(shutil.copytree(uninterrupted, tmp_path / "finished"))


def descendants(pid: int) -> Iterator[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()
    except FileNotFoundError:
        return
    for child in map(int, children):
        yield child
        yield from descendants(child)


def is_running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition: Callable[[], object], what: str, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.005)


def test_a_killed_preparation_goes_on_and_ends_in_the_same_bytes(tmp_path: Path, finished: Path) -> None:
    out_dir = tmp_path / "killed"
    (tmp_path / "c.yaml").write_text(dump_yaml(synthetic_config(out_dir)), encoding="utf-8")
    command = [sys.executable, "-c", RUN, "prepare", str(tmp_path / "c.yaml")]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: len(list(out_dir.glob("train/shard-*.json"))) >= 5, "five shards")
        workers = list(descendants(process.pid))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(workers) >= 2
    # workers that live on would write the shards that the next preparation is writing
    wait_for(lambda: not any(map(is_running, workers)), "the workers of a killed parent to end")
    assert not list(out_dir.rglob("manifest.json"))
    done = {str(path): path.with_suffix(".tar").stat().st_mtime_ns for path in out_dir.glob("train/shard-*.json")}
    assert 5 <= len(done) < 20

    assert subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=False).returncode == 0
    assert published(out_dir) == published(finished)
    assert {name: Path(name).with_suffix(".tar").stat().st_mtime_ns for name in done} == done  # not made again


def test_a_second_run_and_another_number_of_workers_change_nothing(finished: Path) -> None:
    before, times = published(finished), shard_times(finished)
    manifests = prepare(synthetic_config(finished, num_workers=1))
    assert published(finished) == before and shard_times(finished) == times
    assert {split: manifest.num_samples for split, manifest in manifests.items()} == {"train": 160, "val": 20}
    for path in finished.rglob("shard-*"):
        path.unlink()
    prepare(synthetic_config(finished, num_workers=3))
    assert published(finished) == before and all(shard_times(finished)[name] != times[name] for name in times)


def test_what_verify_finds_is_mended_by_preparing_again(finished: Path) -> None:
    before, times = published(finished), shard_times(finished)
    damaged = finished / "train" / "shard-000004.tar"
    content = bytearray(damaged.read_bytes())
    content[900] ^= 1
    damaged.write_bytes(content)
    (finished / "val" / "shard-000001.tar").unlink()
    for directory in (finished / "train", finished / "val"):
        with pytest.raises(InputError, match="run `dermvlp repair`"):
            verify(directory)
    prepare(synthetic_config(finished))
    assert published(finished) == before
    made_again = {name for name, time_ns in shard_times(finished).items() if times[name] != time_ns}
    assert made_again == {str(damaged), str(finished / "val" / "shard-000001.tar")}


def test_other_settings_make_the_shards_again_and_leave_no_old_ones(tmp_path: Path) -> None:
    write_table(tmp_path, plain_rows(10, dx=lambda i: "eczema"))
    (tmp_path / "o.json").write_text('{"root": ["Eczema"], "Eczema": []}', encoding="utf-8")
    columns = {"diagnosis": "dx"}

    def run(**changes: Any) -> tuple[ShardManifest, dict[str, str]]:
        values = {"samples_per_shard": 3, "ontology_path": tmp_path / "o.json"} | changes
        manifest = prepare(table_config(tmp_path, columns, **values))["train"]
        listed = {shard.name: shard.sha256 for shard in manifest.shards}
        assert {path.name for path in (tmp_path / "out" / "train").glob("shard-*.tar")} == set(listed)
        assert verify(tmp_path / "out" / "train") == manifest
        return manifest, listed

    first, shards = run()
    assert run() == (first, shards)
    worse, other = run(images={"jpeg_quality": 50})
    assert worse.config_digest != first.config_digest and not set(other.values()) & set(shards.values())
    # the ontology's content counts, under the same name
    (tmp_path / "o.json").write_text('{"root": ["Skin"], "Skin": ["Eczema"], "Eczema": []}', encoding="utf-8")
    deeper, other = run()
    assert deeper.config_digest != first.config_digest and not set(other.values()) & set(shards.values())
    assert samples(tmp_path / "out" / "train")[0].diagnosis_path == ("skin", "eczema")
    assert len(run(samples_per_shard=5)[1]) == 2
    # a changed image is noticed: its shard alone is made again
    before = shard_times(tmp_path / "out")
    write_image(tmp_path / "img" / "scan009.png", 99)
    run(samples_per_shard=5)
    assert [Path(n).name for n, t in shard_times(tmp_path / "out").items() if before[n] != t] == ["shard-000001.tar"]


def test_an_answer_that_came_late_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A caption that got no answer is served by rules, asked again in the next run, and then its shard is made anew."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    write_table(tmp_path, plain_rows(2))
    fine = {f"Red plaque number {i} on the arm.": answer(("body_site", "On the arm")) for i in range(2)}
    down = Reply("overloaded", 503, headers={"Retry-After": "0"})
    late = "Red plaque number 1 on the arm."
    with serve(lambda caption: [down, fine[caption]] if caption == late else [fine[caption]]) as server:
        decomposer = {"kind": "llm", "model": "tiny", "base_url": server.url, "max_retries": 0}
        config = table_config(tmp_path, samples_per_shard=1, decomposer=decomposer)
        prepare(config)
        first = [sample.subcaptions for sample in samples(tmp_path / "out" / "train")]
        times = shard_times(tmp_path / "out")
        prepare(config)
        second = [sample.subcaptions for sample in samples(tmp_path / "out" / "train")]
        prepare(config.model_copy(update={"decomposer": config.decomposer.model_copy(update={"concurrency": 1})}))
    assert server.num_requests == {caption: 1 + (caption == late) for caption in fine}
    (site,) = second[0]
    assert (site.aspect, site.text) == (Aspect.BODY_SITE, "On the arm")
    assert first[0] == second[0] == second[1] and first[1] != second[1]
    made_again = [Path(name).name for name, time_ns in shard_times(tmp_path / "out").items() if times[name] != time_ns]
    assert made_again == ["shard-000001.tar"]
