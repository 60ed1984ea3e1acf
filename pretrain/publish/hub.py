"""A folder to a repository of the Hub: created private, sent whole, safe to repeat, resumed after an interruption.

`huggingface_hub` does the sending. It leaves out files that the repository has already, makes no commit where nothing
changed, and sends again nothing that had arrived before an interruption. Here: what its errors mean for the publisher,
and which of them are worth another attempt.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import httpx2
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

from data_prep.errors import InputError

T = TypeVar("T")
RepoType = Literal["model", "dataset"]

CARD_NAME = "README.md"  # where the Hub looks for it
TOKEN_VARIABLE = "HF_TOKEN"
_TOKENS_PAGE = "https://huggingface.co/settings/tokens"
_MAX_ATTEMPTS = 5
_FIRST_WAIT_S = 2.0
_AGAIN = "run the same command again later: what has arrived is not sent again"
_REPO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Destination:
    repo: str  # ORG/NAME
    repo_type: RepoType = "model"
    is_public: bool = False
    is_gated: bool = False  # access on request, decided by the owners


def check_repo_name(repo: str) -> None:
    """Raises InputError for what is no ORG/NAME."""
    if not _REPO.fullmatch(repo) or len(repo) > 96 or ".." in repo or "--" in repo:
        raise InputError(f"--repo {repo}: expected ORG/NAME of letters, digits, '-', '_' and '.'")


def token_from_environment() -> str:
    """Raises InputError where there is none. A token on the command line would stand in the shell's history."""
    token = os.environ.get(TOKEN_VARIABLE, "").strip()
    if not token:
        raise InputError(
            f"{TOKEN_VARIABLE} is not set; make a token with write permission at {_TOKENS_PAGE} and export it as "
            f"{TOKEN_VARIABLE}, or look at the folder first with --dry-run"
        )
    return token


def list_files(folder: Path) -> dict[str, int]:
    """Bytes of every file by its name in the folder, as the repository will have it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}


def describe_folder(
    folder: Path, files: Mapping[str, int], to: Destination, url: str | None, facts: Sequence[str] = ()
) -> str:
    """A line a file, `facts`, and where it went; `url` None: nothing was sent."""
    kind = "public" if to.is_public else "private"
    gate = ", access on request" if to.is_gated else ""
    lines = [f"{name:40} {size:>14,} bytes" for name, size in files.items()]
    lines += [
        f"{len(files)} files, {sum(files.values()):,} bytes in {folder}",
        *facts,
        f"to {to.repo} ({kind}{gate}): " + (url or "nothing was sent (--dry-run)"),
    ]
    return "\n".join(lines)


def upload(
    folder: Path,
    files: Sequence[str],
    to: Destination,
    message: str,
    obsolete: Sequence[str] = (),
    first_wait_s: float = _FIRST_WAIT_S,
) -> str:
    """The files of a folder, by their names relative to it, as a commit (hf_xet can make several of a large folder).

    Returns the URL of the last.

    Args:
        obsolete: names (or patterns) of ours that the repository may hold from before and that are not among `files`.
        first_wait_s: before the second attempt at what failed for the moment; doubled each time.

    Raises InputError, with the remedy, for what the Hub refuses and for what fails `_MAX_ATTEMPTS` times.
    """
    token = token_from_environment()
    api = HfApi(token=token, library_name="dermvlp")

    def attempt(action: Callable[[], T]) -> T:
        return _with_retries(action, to, first_wait_s, token)

    # made public below, when all has arrived
    attempt(lambda: api.create_repo(to.repo, repo_type=to.repo_type, private=True, exist_ok=True))
    info = attempt(lambda: api.repo_info(to.repo, repo_type=to.repo_type))
    if not to.is_public and not info.private:
        raise InputError(
            f"{to.repo} is public already; publish with --public, choose another --repo, or make it private in its "
            "settings on the Hub"
        )
    held_before = attempt(lambda: api.list_repo_files(to.repo, repo_type=to.repo_type)) if to.is_public else []
    if to.is_gated and not info.gated:  # before there is anything in it
        attempt(lambda: api.update_repo_settings(to.repo, repo_type=to.repo_type, gated="manual"))
    commit = attempt(
        lambda: api.upload_folder(
            repo_id=to.repo,
            repo_type=to.repo_type,
            folder_path=folder,
            allow_patterns=list(files),
            delete_patterns=list(obsolete) or None,
            commit_message=message,
        )
    )
    if to.is_public and info.private:
        held = attempt(lambda: api.list_repo_files(to.repo, repo_type=to.repo_type))
        others = sorted({*held} - {*files, ".gitattributes"})
        if others:
            raise InputError(
                f"{to.repo}: holds {len(others)} files of no publication of yours ({', '.join(others[:3])} ...), and "
                "they would be public; delete them on the Hub, or choose another --repo. It is private still"
            )
        if held_before:  # what earlier uploads held, and this one does not, is not shown either
            attempt(lambda: api.super_squash_history(repo_id=to.repo, repo_type=to.repo_type))
        attempt(lambda: api.update_repo_settings(to.repo, repo_type=to.repo_type, private=False))
    return str(commit.commit_url)


def _with_retries(action: Callable[[], T], to: Destination, first_wait_s: float, token: str) -> T:
    for number in range(1, _MAX_ATTEMPTS + 1):
        try:
            return action()
        except (HfHubHTTPError, httpx2.HTTPError, HFValidationError, RuntimeError, ValueError, OSError) as error:
            cause = _hub_error(error)
            if cause is None:
                raise
            reason = _reason(cause, to)
            if reason is not None:
                raise InputError(reason.replace(token, "***")) from None
            said = f"{type(cause).__name__}: {_first_line(cause)}".replace(token, "***")
            if number == _MAX_ATTEMPTS:
                raise InputError(f"{to.repo}: {_gave_up(cause)} ({said}); {_AGAIN}") from None
            wait_s = first_wait_s * 2 ** (number - 1)
            print(f"{said}; attempt {number + 1} of {_MAX_ATTEMPTS} in {wait_s:.0f} s", flush=True)
            time.sleep(wait_s)
    raise AssertionError("unreachable")


def _hub_error(error: BaseException) -> BaseException | None:
    """What the Hub or the connection said, also where huggingface_hub wrapped it; None for an error of another kind."""
    current: BaseException | None = error
    while current is not None:
        if isinstance(current, (httpx2.HTTPError, HFValidationError, json.JSONDecodeError)) or _is_bad_card(current):
            return current
        current = current.__cause__ or current.__context__
    return None


def _is_bad_card(error: BaseException) -> bool:
    return isinstance(error, ValueError) and str(error).startswith("Invalid metadata in README.md")


def _gave_up(error: BaseException) -> str:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status in (409, 412):
        return f"somebody else changes the repository at the same time, {_MAX_ATTEMPTS} attempts collided"
    return f"the Hub could not be reached, or failed, {_MAX_ATTEMPTS} times"


def _reason(error: BaseException, to: Destination) -> str | None:
    """What the publisher has to change; None for what may pass by itself (5xx, 429, 409, a lost connection)."""
    if isinstance(error, HFValidationError) or _is_bad_card(error):
        return f"{to.repo}: {_first_line(error, 3)}"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 401 and not isinstance(error, RepositoryNotFoundError):
        return (
            f"{to.repo}: the Hub does not accept the token of {TOKEN_VARIABLE} (401): it is mistyped, expired or "
            f"revoked; make a new one at {_TOKENS_PAGE}"
        )
    if status == 403:
        return (
            f"{to.repo}: the token of {TOKEN_VARIABLE} may not write there (403); give it write permission for "
            f"{to.repo.partition('/')[0]}, or publish under a name of your own"
        )
    if status in (401, 404):
        return (
            f"{to.repo}: not found on the Hub, or closed to the token of {TOKEN_VARIABLE} ({status}); check the name "
            "and the token's permissions"
        )
    if status is not None and 400 <= status < 500 and status not in (408, 409, 412, 429):
        return f"{to.repo}: the Hub refuses ({status}): {_first_line(error, 3)}"
    return None


def _first_line(error: BaseException, num_lines: int = 1) -> str:
    text = re.sub(r"\?[^\s']+", "?...", str(error))  # the signature of an upload's address is as good as a token
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[:num_lines]) or type(error).__name__
