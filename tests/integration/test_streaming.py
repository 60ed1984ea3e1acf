"""Runs that read their shards from a real HTTP server, a command's pipe and a folder."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.cli import main
from pretrain.config import TrainConfig
from pretrain.data import remote
from pretrain.data.manifest import ShardedDataset
from pretrain.data.plan import epoch_order
from pretrain.data.remote import http_problem
from pretrain.train.checkpoint import list_checkpoints
from pretrain.train.metrics import read_metrics
from pretrain.train.state import with_num_steps
from tests.distributed.run import run_on_ranks
from tests.distributed.stream_epoch import SEED, read_epoch
from tests.integration.conftest import write_config
from tests.integration.shard_server import ShardServer, serve
from tests.integration.test_train import ENVIRONMENT, command, losses, run, weights


@pytest.fixture
def server(prepared_dir: Path) -> Iterator[ShardServer]:
    with serve(prepared_dir / "train") as running:
        yield running


@pytest.fixture
def index_dir(prepared_dir: Path, tmp_path: Path) -> Path:
    """What is copied beforehand: the manifest and the index, no shard."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in ("manifest.json", "index.npy"):
        shutil.copy(prepared_dir / "train" / name, folder)
    return folder


@pytest.fixture
def stream_config(run_config: dict[str, Any], index_dir: Path, server: ShardServer) -> dict[str, Any]:
    stream = {"url": server.url, "shuffle_buffer": 8}
    run_config["data"] = {"train_dir": str(index_dir), "num_workers": 0, "stream": stream}
    return run_config | {"num_steps": 4, "checkpoint": {"every": 2, "keep_last": 5}}


def test_an_epoch_over_http_gives_two_ranks_every_sample_once(server: ShardServer, index_dir: Path) -> None:
    ranks = run_on_ranks(read_epoch, 2, str(index_dir), server.url, 4)  # each with two reader processes
    samples = torch.stack([rank["sample_SB"] for rank in ranks])
    assert samples.shape == (2, 4, 10) and len(samples.unique()) == 80  # of 96: three shards of 16 a rank, 10 a step
    assert torch.equal(ranks[0]["text_SNK"], ranks[1]["text_SNK"])  # each rank planned the texts of both
    assert torch.equal(ranks[0]["num_encoded_S"] + ranks[1]["num_encoded_S"], ranks[0]["num_texts_S"])
    assert all(count == 1 for count in server.requests.values()) and len(server.requests) == 6
    indexed = epoch_order(ShardedDataset(server.directory).shard_sizes, SEED, 0, shards_per_block=2)
    assert (samples.transpose(0, 1).reshape(-1).numpy() != indexed[:80]).mean() > 0.8


def test_http_pipe_and_folder_train_alike_and_a_dropped_connection_changes_nothing(
    stream_config: dict[str, Any], server: ShardServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "run.yaml", stream_config)
    server.num_drops = {"shard-000000.tar": 1, "shard-000003.tar": 2}
    urls = {"http": server.url, "pipe": f"pipe:cat {server.directory}/{{}}", "folder": str(server.directory)}
    curves = {}
    for name, url in urls.items():
        assert main(["train", str(config), f"run_dir={tmp_path / name}", f"data.stream.url={url}"]) == 0
        curves[name] = losses(tmp_path / name)
        said = capfd.readouterr().err
        assert f"streaming from {url}: 6 shards for 1 rank(s) x 1 reader(s), shuffle_buffer 8" in said
        if name == "http":
            assert re.search(
                r"shard-000000.tar: the connection dropped \(.* 18\), after \d+ samples; reading it again",
                said,
            )
            assert server.num_drops["shard-000000.tar"] == 0  # really dropped
    assert [record["step"] for record in curves["http"]] == [1, 2, 3, 4]
    assert all(abs(value) < 100 for record in curves["http"] for value in record.values())
    assert curves["http"] == curves["folder"] == curves["pipe"]


def test_a_resumed_run_goes_on_at_a_shards_boundary(
    stream_config: dict[str, Any], server: ShardServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """To the same losses and weights, reading no shard that was used up."""
    stream_config |= {"num_steps": 11}
    config = write_config(tmp_path / "run.yaml", stream_config)
    assert main(["train", str(config)]) == 0
    expected, run_dir = losses(stream_config["run_dir"]), Path(stream_config["run_dir"])
    theirs = weights(run_dir, 11)
    for checkpoint in list_checkpoints(run_dir):
        if checkpoint.name > "step-00000008":
            shutil.rmtree(checkpoint)
    capfd.readouterr()
    server.requests.clear()
    assert main(["train", str(config)]) == 0
    said = capfd.readouterr().err
    match = re.search(r"rank 0 reads (\d) of its 6 shards of epoch 0 from their start, and drops (\d+) samples", said)
    assert match and "from step 8" in said
    # 64 of 96 samples are used; the edges of the text buckets are the checkpoint's, so nothing else is read
    assert 2 <= int(match[1]) == len(server.requests) <= 5 and int(match[2]) == 16 * int(match[1]) - 32
    assert losses(run_dir) == expected
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in weights(run_dir, 11).items())

    shutil.rmtree(run_dir / "checkpoints" / "step-00000011")
    assert main(["train", str(config), "data.num_workers=2"]) == 0
    assert re.search(
        r"warning: the sample order is another one.*1 reader.*now 1 rank.s. x 2 reader", capfd.readouterr().err
    )


def test_two_ranks_stop_by_a_signal_and_go_on(stream_config: dict[str, Any], tmp_path: Path) -> None:
    """In the third epoch: the exchange that is under way when they stop leaves nothing waiting."""
    config = write_config(tmp_path / "run.yaml", stream_config | {"num_steps": 40, "checkpoint": {"every": 100}})
    run_dir = Path(stream_config["run_dir"])
    process = subprocess.Popen(command(config, 2), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and len(read_metrics(run_dir / "metrics.jsonl")) < 26:
        time.sleep(0.01)
    process.terminate()
    said = process.communicate(timeout=60)[1]
    match = re.search(r"stopped by a signal after step (\d+); saved", said)
    assert match and 26 <= int(match[1]) < 40, said[-3000:]
    assert "6 shards for 2 rank(s) x 1 reader(s)" in said and "12 steps an epoch" in said
    resumed = run(config, 2)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert (
        f"from step {match[1]}" in resumed.stderr
        and f"of its 3 shards of epoch {int(match[1]) // 12}" in resumed.stderr
    )
    assert [record["step"] for record in losses(run_dir)] == list(range(1, 41))


def test_epochs_are_turned_into_the_steps_of_the_rank_that_is_dealt_least(stream_config: dict[str, Any]) -> None:
    del stream_config["num_steps"]
    config = TrainConfig.model_validate(stream_config | {"num_epochs": 3, "global_batch_size": 40})
    assert with_num_steps(config, num_ranks=1).num_steps == 6
    assert with_num_steps(config, num_ranks=4).num_steps == 3  # a rank of one shard: 16 samples, 10 a step


def test_what_the_server_does_not_have_is_one_message(
    stream_config: dict[str, Any],
    server: ShardServer,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = write_config(tmp_path / "run.yaml", stream_config)
    assert main(["train", str(config), f"data.stream.url={server.url}elsewhere/", "data.num_workers=1"]) == 2
    said = capfd.readouterr().err
    assert re.search(rf"error: {server.url}elsewhere/shard-00000\d.tar: HTTP status 404 \(File not found\)", said)
    assert said.count("elsewhere") == 1 and "Traceback" not in said
    # nor is it there for a reader process, past the start of the run
    edges = "data.text_bucket_edges=[16, 32, 64]"
    assert main(["train", str(config), edges, f"data.stream.url={server.url}elsewhere/", "data.num_workers=1"]) == 2
    assert re.search(r"error: http\S+: HTTP status 404 \(File not found\); does data", capfd.readouterr().err)
    monkeypatch.setattr(remote, "_FIRST_PAUSE_S", 0.0)
    assert main(["train", str(config), "data.stream.url=http://127.0.0.1:1/"]) == 2
    assert "tar: no connection (curl's exit status 7), 5 times in a row; does data" in capfd.readouterr().err
    server.num_unavailable = 1
    assert http_problem(f"{server.url}shard-000000.tar") == ("HTTP status 503 (Service Unavailable)", False)
    assert http_problem(f"{server.url}shard-000000.tar") == ("the server refused it, and has it now", False)


def test_what_cannot_work_is_refused_before_the_first_step(
    stream_config: dict[str, Any], index_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = str(write_config(tmp_path / "run.yaml", stream_config))
    assert main(["train", config, "launch.num_ranks=4", "data.num_workers=2"]) == 2
    assert "6 shard(s) are fewer than 4 rank(s) x 2 reader(s) = 8" in capfd.readouterr().err
    assert main(["train", config, "data.num_workers=7"]) == 2
    assert "6 shard(s) are fewer than 1 rank(s) x 7 reader(s) = 7" in capfd.readouterr().err
    assert main(["train", config, f"data.stage_dir={tmp_path}"]) == 2
    assert "set one of them" in capfd.readouterr().err
    objectives = [{"kind": "clip", "aspects": ["diagnosis"], "ontology": {"alpha": 0.2}}]
    ontology = write_config(tmp_path / "ontology.yaml", stream_config | {"objectives": objectives})
    assert main(["train", str(ontology)]) == 2
    assert "`ontology` reads samples all over the data" in capfd.readouterr().err

    manifest = index_dir / "manifest.json"
    values = json.loads(manifest.read_text())
    values["shards"][3]["name"] = "a;touch gone;.tar"
    manifest.write_text(json.dumps(values))
    assert main(["train", config]) == 2
    assert "shards.3.name" in capfd.readouterr().err
    assert not Path("gone").exists()
