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
    """Downloads files into a directory, but for those that are there already.

    Args:
        url: their folder.
        sha256: checksum of each file by its name.
        directory: where to keep them.

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

    match error:
        case exceptions.HTTPError(response=response) if response is not None:
            return f"is answered with HTTP status {response.status_code}"
        case _ if isinstance(error, multiprocessing.TimeoutError) or "timed out" in str(error):
            return f"sends no byte for {GIVE_UP_AFTER:g} seconds"
        case exceptions.SSLError():
            return "has no certificate that this machine trusts"
        case exceptions.ConnectionError():
            return "cannot be reached"
        case exceptions.RequestException():
            return f"does not come whole ({shorten(error)})"
        case ValueError():
            return "has other bytes than the registered checksum says"
    return f"cannot be kept ({error})"
