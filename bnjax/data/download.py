"""Fetching files over the network with TFDS's download manager, bounded in time.

TFDS sets no time-out and cannot be interrupted, so the download runs in a process of its own:
this file, executed as a script. It reads a request from standard input, watches the bytes that
arrive, and answers with one line of JSON.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

GIVE_UP_AFTER = 10.0  # seconds without a byte


def fetch(files: list[tuple[str, int, str]], temporary: Path, directory: Path) -> None:
    """Downloads files and moves each to its place once it is whole and its checksum is right.

    Args:
        files: (URL, size in bytes, SHA-256) of each.
        temporary: an empty directory for files under way, on the same file system.
        directory: where the files go, under the last part of their URL.

    Raises:
        DownloadError: if one cannot be had; the others stay and are not downloaded again.
    """
    from bnjax.errors import DownloadError  # not at the top: the script would load all of bnjax

    request = {"files": files, "temporary": str(temporary), "seconds": GIVE_UP_AFTER}
    process = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", __file__],
        input=json.dumps(request),
        stdout=subprocess.PIPE,
        stderr=None if sys.stderr.isatty() else subprocess.DEVNULL,
        text=True,
        check=False,
    )
    try:
        answer = json.loads(process.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        answer = {"done": {}, "error": f"the download ended with status {process.returncode}"}
    for url, path in answer["done"].items():
        Path(path).replace(directory / url.rsplit("/", 1)[-1])
    if answer["error"] or len(answer["done"]) < len(files):
        raise DownloadError(answer["error"] or "the download ended early")


def main() -> None:
    request = json.load(sys.stdin)
    import tensorflow_datasets.core.download  # before the clock starts  # noqa: F401

    last_byte = time.monotonic()
    read_into = socket.SocketIO.readinto

    def watched(self, buffer):
        nonlocal last_byte
        count = read_into(self, buffer)
        last_byte = time.monotonic()
        return count

    socket.SocketIO.readinto = watched  # type: ignore[method-assign]
    answer: dict[str, Any] = {"done": {}, "error": None}
    worker = threading.Thread(target=_download, args=(request, answer), daemon=True)
    worker.start()
    while worker.is_alive():
        worker.join(timeout=0.05)
        if time.monotonic() - last_byte > request["seconds"]:
            answer["error"] = (
                f"no byte came from {_host(request)} for {request['seconds']:g} seconds"
            )
            break
    print(json.dumps(answer), flush=True)
    os._exit(0)  # TFDS's own threads would keep a stalled download waiting


def _download(request: dict, answer: dict) -> None:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download import downloader
    from tensorflow_datasets.core.download.checksums import UrlInfo

    downloader.MAX_RETRIES = 2  # of 10, which take 200 seconds where there is no network
    infos = {
        url: UrlInfo(size=size, checksum=sha256, filename=Path(url).name)
        for url, size, sha256 in request["files"]
    }
    try:
        manager = tfds.download.DownloadManager(
            download_dir=request["temporary"], url_infos=infos, force_checksums_validation=True
        )
        for url in infos:
            answer["done"][url] = str(manager.download(url))
    except Exception as error:
        answer["error"] = _explain(error, _host(request))


def _explain(error: Exception, host: str) -> str:
    from requests import exceptions
    from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

    text = " ".join(str(error).split())
    match error:
        case NonMatchingChecksumError():
            return f"{host} serves other bytes than the registered checksum says"
        case exceptions.ChunkedEncodingError():
            return f"{host} broke the connection off in the middle of a file"
        case exceptions.SSLError():
            return f"{host} has no certificate that this machine trusts"
        case exceptions.RetryError():
            return f"{host} answers with server errors"
        case exceptions.ConnectionError():
            return f"{host} cannot be reached"
        case OSError() if error.strerror:
            return f"a file could not be written ({error.strerror})"
    if status := re.search(r"HTTP code: (\d+)", text):
        return f"{host} answers with HTTP status {status[1]}"
    return f"{host} did not serve the file ({text[:200]})"


def _host(request: dict) -> str:
    return request["files"][0][0].split("/")[2]


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is for the parent to explain
    main()
