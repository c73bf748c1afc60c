"""Fetching a file over the network with pooch: bounded in time, whole or not at all."""

import io
import sys
import tempfile
from multiprocessing.pool import ThreadPool
from pathlib import Path

from bnjax.errors import DownloadError, shorten

GIVE_UP_AFTER = 10.0  # seconds without a byte


def fetch(url: str, sha256: str, directory: Path) -> None:
    """Downloads a file into a directory, under the last part of its URL.

    Raises:
        DownloadError: if these bytes cannot be had; what lay there before stays.
        OSError: if the directory cannot be written to.
    """
    import pooch
    from tqdm import tqdm

    host, name = url.split("/")[2], url.rsplit("/", 1)[-1]
    shown = sys.stderr if sys.stderr.isatty() else io.StringIO()
    with (
        tempfile.TemporaryDirectory(dir=directory) as temporary,
        tqdm(desc=name, total=1, unit="B", unit_scale=True, leave=False, file=shown) as progress,
    ):
        file = Path(temporary, name)
        download = pooch.HTTPDownloader(progressbar=progress, timeout=GIVE_UP_AFTER)
        # The time-out holds for each address of a host, and not for looking them up, which
        # Ctrl-C cannot interrupt: hence a thread that is left behind when nothing comes.
        pool = ThreadPool(1)
        end = pool.apply_async(download, (url, str(file), None))
        pool.close()
        try:
            while not end.ready():
                before = progress.n
                end.wait(GIVE_UP_AFTER)
                if not end.ready() and progress.n == before:
                    raise TimeoutError("timed out")
            end.get()
        except Exception as error:
            raise DownloadError(_explain(error, host)) from error
        if pooch.file_hash(str(file), alg="sha256") != sha256:
            raise DownloadError(f"{host} serves other bytes than the registered checksum says")
        file.replace(directory / name)


def _explain(error: Exception, host: str) -> str:
    from requests import exceptions

    match error:
        case exceptions.HTTPError(response=response) if response is not None:
            response.close()  # pooch leaves it open
            return f"{host} answers with HTTP status {response.status_code}"
        case OSError() if "timed out" in str(error):
            return f"no byte came from {host} for {GIVE_UP_AFTER:g} seconds"
        case exceptions.ChunkedEncodingError():
            return f"{host} broke the connection off in the middle of a file"
        case exceptions.SSLError():
            return f"{host} has no certificate that this machine trusts"
        case exceptions.ConnectionError():
            return f"{host} cannot be reached"
        case OSError() if error.strerror:
            return f"a file could not be written ({error.strerror})"
    return f"{host} did not serve the file ({shorten(error)})"
