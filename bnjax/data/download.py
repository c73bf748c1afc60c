"""Fetching files over the network with pooch: bounded in time, each whole or not at all."""

import multiprocessing
import sys
from collections.abc import Mapping
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from bnjax.errors import DownloadError, shorten

GIVE_UP_AFTER = 10.0  # seconds without a byte


def fetch(url: str, sha256: Mapping[str, str], directory: Path) -> None:
    """Downloads the files of that name and checksum that a directory does not have yet.

    Raises:
        DownloadError: if one cannot be had, also not when asked for again; those before it stay.
    """
    import pooch  # slow, and mostly not needed

    pooch.get_logger().setLevel("INFO" if sys.stderr.isatty() else "WARNING")
    store = pooch.create(directory, url, registry=dict(sha256), retry_if_failed=1)
    for name in sha256:
        try:
            store.fetch(name, downloader=_download)
        except Exception as error:
            raise DownloadError(f"{url}{name} {_explain(error)}") from error


def _download(url: str, temporary: str, _: Any) -> None:
    import requests

    # The time-out holds for each address of a host, and not for looking them up, which Ctrl-C
    # cannot interrupt: hence a thread that is left behind when nothing comes.
    pool = ThreadPool(1)
    answer = pool.apply_async(requests.get, [url], {"stream": True, "timeout": GIVE_UP_AFTER})
    pool.close()
    path = Path(temporary)
    with answer.get(GIVE_UP_AFTER) as response, path.open("wb") as file:
        response.raise_for_status()
        file.writelines(response.iter_content(2**16))
    path.chmod(0o644)  # it is its owner's alone until then


def _explain(error: Exception) -> str:
    from requests import exceptions

    if isinstance(error, multiprocessing.TimeoutError) or "timed out" in str(error):
        return f"sends no byte for {GIVE_UP_AFTER:g} seconds"
    reasons = {
        exceptions.SSLError: "has no certificate that this machine trusts",
        exceptions.ConnectionError: "cannot be reached",
        exceptions.RequestException: f"does not come ({shorten(error)})",
        ValueError: "has other bytes than the registered checksum says",
        Exception: f"cannot be kept ({error})",
    }
    return next(reason for kind, reason in reasons.items() if isinstance(error, kind))
