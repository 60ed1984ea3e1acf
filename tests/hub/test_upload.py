"""Uploads to a local stand-in of the Hub: created, unchanged, refused, failing, dropped, killed and resumed."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep.shards.manifest import verify
from tests.hub.client import run, start
from tests.hub.server import TOKEN, Fault, Hub

pytestmark = pytest.mark.hub

#: several uploads in one process, since the imports of huggingface_hub take a second each time
UPLOADS = """
import sys
from pathlib import Path
from data_prep.errors import InputError
from pretrain.publish.hub import Destination, upload

folder = Path(sys.argv[1])
for options in sys.argv[2:]:
    repo, *flags = options.split(",")
    to = Destination(repo, is_public="public" in flags, is_gated="gated" in flags)
    files = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    obsolete = ["old.json"] if "clean" in flags else []
    try:
        print("SENT", upload(folder, files, to, "test", obsolete, first_wait_s=0.01))
    except InputError as error:
        print("REFUSED", error)
"""
WEIGHTS = b"w" * 300_000
OTHER_WEIGHTS = b"o" * 200_000


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    (folder / "evaluations").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    (folder / "open_clip_model.safetensors").write_bytes(WEIGHTS)
    (folder / "model.safetensors").write_bytes(OTHER_WEIGHTS)
    (folder / "evaluations" / "ham.json").write_text("{}")
    return folder


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def num_commits(hub: Hub, repo: str = "me/derm") -> int:
    return len(hub.state.repos["model", repo].commits) - 1  # without that of the creation


def test_private_whole_and_safe_to_repeat(hub: Hub, folder: Path, tmp_path: Path) -> None:
    printed = run(hub, tmp_path, UPLOADS, folder, "me/derm", "me/derm", "me/open,public", "me/asked,gated,public")
    assert printed.count("SENT") == 4
    repos = {name: repo for (_, name), repo in hub.state.repos.items()}
    assert {name: repo.private for name, repo in repos.items()} == {
        "me/derm": True,
        "me/open": False,
        "me/asked": False,
    }
    assert [repos[name].gated for name in repos] == [False, False, "manual"]
    stored = {name: hub.state.blobs[oid] for name, (oid, _) in repos["me/derm"].files.items()}
    assert stored == {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
    assert repos["me/derm"].files["model.safetensors"] == (sha256(OTHER_WEIGHTS), True)
    assert num_commits(hub) == 1  # the second time nothing had changed
    assert hub.state.requests[f"PUT /lfs/{sha256(WEIGHTS)}"] == 1


def test_what_is_no_longer_made_is_removed_and_other_files_stay(hub: Hub, folder: Path, tmp_path: Path) -> None:
    for name in ("old.json", "by_hand.txt"):
        (folder / name).write_text("{}")
    run(hub, tmp_path, UPLOADS, folder, "me/derm")
    for name in ("old.json", "by_hand.txt"):
        (folder / name).unlink()
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    run(hub, tmp_path, UPLOADS, folder, "me/derm,clean")
    assert set(hub.state.repos["model", "me/derm"].files) == {
        *("README.md", "open_clip_model.safetensors", "model.safetensors", "evaluations/ham.json", "by_hand.txt")
    }
    assert num_commits(hub) == 2


def test_refusals_name_the_remedy_and_never_the_token(hub: Hub, folder: Path, tmp_path: Path) -> None:
    printed = run(hub, tmp_path, UPLOADS, folder, "me/open,public", "me/open", "others/derm")
    assert "me/open is public already; publish with --public" in printed
    assert (
        "others/derm: the token of HF_TOKEN may not write there (403); give it write permission for others" in printed
    )
    wrong = "hf_another_token"
    refused = run(hub, tmp_path, UPLOADS, folder, "me/derm", token=wrong)
    assert "does not accept the token of HF_TOKEN (401)" in refused and "settings/tokens" in refused
    missing = run(hub, tmp_path, UPLOADS, folder, "me/derm", token=None)
    assert "HF_TOKEN is not set" in missing
    assert ("model", "me/derm") not in hub.state.repos
    for text in (printed, refused, missing):
        assert wrong not in text and TOKEN not in text
    hub.state.faults.append(Fault("POST", "/preupload/", status=400, message=f"bad {TOKEN}"))
    (folder / "README.md").write_text("# without front matter\n")
    printed = run(hub, tmp_path, UPLOADS, folder, "me/derm", "me/derm")
    assert "Invalid metadata in README.md" in printed and "license is missing" in printed
    (folder / "README.md").unlink()
    printed = run(hub, tmp_path, UPLOADS, folder, "me/derm")
    assert "the Hub refuses (400)" in printed and TOKEN not in printed


def test_what_passes_by_itself_is_tried_again(hub: Hub, folder: Path, tmp_path: Path) -> None:
    oid = sha256(WEIGHTS)
    hub.state.faults += [
        Fault("POST", "/repos/create", status=502),
        Fault("POST", "/commit/", status=409),
        Fault("POST", "/commit/", status=503),
        Fault("PUT", f"/lfs/{oid}", status=0),  # the connection drops in the middle of the file
    ]
    printed = run(hub, tmp_path, UPLOADS, folder, "me/derm")
    assert printed.count("attempt 2 of 5") == 2 and "attempt 3 of 5" in printed and "SENT" in printed
    assert not hub.state.faults and num_commits(hub) == 1
    assert hub.state.requests[f"PUT /lfs/{oid}"] == 2 and hub.state.blobs[oid] == WEIGHTS
    # the commit was refused twice, and nothing that had arrived was sent again
    assert hub.state.requests[f"PUT /lfs/{sha256(OTHER_WEIGHTS)}"] == 1


def test_what_never_passes_ends_with_a_message(hub: Hub, folder: Path, tmp_path: Path) -> None:
    hub.state.faults += [
        Fault("POST", "/me/busy/commit/", status=409, times=99),
        Fault("POST", "/me/broken/commit/", status=500, times=99),
        Fault("POST", "/me/lost/commit/", status=0, times=99),
    ]
    printed = run(hub, tmp_path, UPLOADS, folder, "me/busy", "me/broken", "me/lost")
    refused = [line for line in printed.splitlines() if line.startswith("REFUSED")]
    assert "me/busy: somebody else changes the repository at the same time, 5 attempts collided" in refused[0]
    assert "me/broken: the Hub could not be reached, or failed, 5 times" in refused[1]
    assert "me/lost: the Hub could not be reached, or failed, 5 times" in refused[2]
    assert all("run the same command again later: what has arrived is not sent again" in line for line in refused)


def test_a_killed_upload_goes_on_where_it_was(hub: Hub, folder: Path, tmp_path: Path) -> None:
    held = threading.Event()
    hub.state.faults.append(Fault("PUT", f"/lfs/{sha256(WEIGHTS)}", hold=held))
    process = start(hub, tmp_path, UPLOADS, folder, "me/derm")
    try:
        assert held.wait(60)
        deadline = time.monotonic() + 60
        while sha256(OTHER_WEIGHTS) not in hub.state.blobs and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        process.kill()
        process.communicate()
    assert num_commits(hub) == 0 and sha256(WEIGHTS) not in hub.state.blobs
    assert "SENT" in run(hub, tmp_path, UPLOADS, folder, "me/derm")
    assert num_commits(hub) == 1 and hub.state.blobs[sha256(WEIGHTS)] == WEIGHTS
    assert hub.state.requests[f"PUT /lfs/{sha256(OTHER_WEIGHTS)}"] == 1
    assert hub.state.requests[f"PUT /lfs/{sha256(WEIGHTS)}"] == 2


PUBLISH_DATA = """
import sys
from pathlib import Path
from pretrain.publish.data_set import publish_data

for _ in range(2):
    print("SENT", publish_data([Path(sys.argv[1])], "me/data", Path(sys.argv[2])).url)
assert "torch" not in sys.modules
from huggingface_hub import snapshot_download
print(snapshot_download("me/data", repo_type="dataset", local_dir=sys.argv[3]))
"""


def test_a_data_set_is_sent_and_comes_back(hub: Hub, prepared_dir: Path, tmp_path: Path) -> None:
    back = tmp_path / "back"
    printed = run(hub, tmp_path, PUBLISH_DATA, prepared_dir / "val", tmp_path / "out", back)
    assert printed.count("SENT") == 2
    repo = hub.state.repos["dataset", "me/data"]
    assert repo.private and len(repo.commits) == 2  # its creation, and one commit for two publications
    assert repo.files["val/shard-000000.tar"][1] and repo.files["val/captions.parquet"][1]
    assert verify(back / "val").num_samples == 24
