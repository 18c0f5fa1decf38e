"""One HTTP transfer into a file: `.NAME.<hash>.part` beside the target, then rename; the engine of `download`.

    request (Range from the part file) -> append -> hash -> rename
          ^-- wait (back-off, Retry-After) <-- what may pass later

The part file is an earlier attempt's too: a `.json` beside it keeps the validator (ETag or Last-Modified) it was made
with, and `If-Range` makes the server send the whole file when that no longer holds.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import random
import shutil
import socket
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import httpx

from steps import Context, StepError, StepFailed
from steps._files import write_whole
from steps._http import TRANSIENT_STATUS, http_client, is_certificate_error, retry_after_s, without_secrets
from steps._rate import Rate


class _Transient(Exception):
    """This try failed, another may not. `wait_s` is what the server asked for."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class Transfer:
    """Gets `url` into `target`; `headers` are sent to the first origin only, never to where it redirects."""

    def __init__(
        self,
        url: str,
        target: Path,
        sha256: str,
        headers: Mapping[str, str],
        context: Context,
        *,
        backoff_s: float = 0.5,
        tries_without_progress: int = 6,
        tries: int = 100,
        longest_wait_s: float = 120,
    ) -> None:
        self.url = url
        self.shown_url = without_secrets(url)
        self.target = target
        self.sha256 = sha256
        self.headers = dict(headers)
        self.context = context
        self.backoff_s = backoff_s
        self.tries_without_progress = tries_without_progress
        self.tries = tries
        self.longest_wait_s = longest_wait_s
        name = hashlib.sha256(f"{url}\n{target}".encode()).hexdigest()[:16]
        self.part = target.with_name(f".{target.name[:100]}.{name}.part")
        self.validator_file = self.part.with_suffix(".json")
        self._resumed = False
        self._wake = threading.Event()
        self._socket: socket.socket | None = None
        self._rate = Rate()

    def run(self) -> str:
        """Transfer the file; its sha256. Raises `StepError` for what is final, `StepFailed` for what may pass later."""
        self.context.on_cancel(self._hang_up)
        with self._disk_errors():
            self.target.parent.mkdir(parents=True, exist_ok=True)
        with self._disk_errors(), self._locked_part() as part, self._client() as client:
            found = self._get_whole(client, part)
            if self.sha256 and found != self.sha256 and self._resumed:
                self.context.log("sha256 differs after resuming; starting from the beginning")
                self._restart(part)
                found = self._get_whole(client, part)
            if self.sha256 and found != self.sha256:
                self._discard()
                raise StepError(
                    f"sha256 of `{self.shown_url}` is `{found}`, wanted `{self.sha256}`\n\n"
                    "hint: the file on the server has changed, or `sha256` in the plan is wrong"
                )
            os.fsync(part.fileno())
            self.part.replace(self.target)
            self.validator_file.unlink(missing_ok=True)
        return found

    def _get_whole(self, client: httpx.Client, part: BinaryIO) -> str:
        """Try until the part file is complete; its sha256."""
        fruitless = 0
        for number in range(1, self.tries + 1):
            before = part.seek(0, os.SEEK_END)
            try:
                self._get_rest(client, part)
                return self._hash(part)
            except (httpx.InvalidURL, httpx.UnsupportedProtocol, httpx.TooManyRedirects) as error:
                raise StepError(f"`{self.shown_url}` cannot be followed: {error}") from error
            except (_Transient, httpx.TransportError) as error:
                self.context.check_cancelled()
                fruitless = 0 if part.seek(0, os.SEEK_END) > before else fruitless + 1
                reason = str(error) or type(error).__name__
                if is_certificate_error(error):
                    raise StepError(f"`{self.shown_url}`: {reason}\n\nhint: set `SSL_CERT_FILE` in `env`") from error
                if fruitless >= self.tries_without_progress or number == self.tries:
                    raise self._give_up(reason, number) from error
                asked = error.wait_s if isinstance(error, _Transient) else None
                self._wait(asked, fruitless, reason)
        raise AssertionError("unreachable")

    def _get_rest(self, client: httpx.Client, part: BinaryIO) -> None:
        offset = part.seek(0, os.SEEK_END)
        headers = {**self.headers, "Accept-Encoding": "identity", **self._range_headers(offset)}
        if offset and "Range" not in headers:
            offset = self._restart(part)
        with client.stream("GET", self.url, headers=headers) as response:
            self._socket = response.extensions["network_stream"].get_extra_info("socket")
            if response.status_code == 416:
                if offset and response.headers.get("Content-Range") == f"bytes */{offset}":
                    self._resumed = True
                    return
                self._restart(part)
                raise _Transient("the server does not have the range asked for", 0)
            self._check_status(response)
            if response.status_code == 206:
                self._check_range(response, part, offset)
                self._resumed = True
                self.context.log(f"resuming `{self.shown_url}` at byte {offset}")
            elif offset:
                offset = self._restart(part)
            self._remember(response)
            total = _total(response)
            self._check_space(total, offset)
            self._copy(response, part, offset, total)

    def _copy(self, response: httpx.Response, part: BinaryIO, offset: int, total: int | None) -> None:
        try:
            for chunk in response.iter_raw():
                self.context.check_cancelled()
                part.write(chunk)
                offset += len(chunk)
                self.context.heartbeat(self._rate.progress(len(chunk), offset, total))
        finally:
            part.flush()
        if total is not None and offset != total:
            raise _Transient(f"got {offset} of {total} bytes")

    def _range_headers(self, offset: int) -> dict[str, str]:
        """Headers that ask for the rest; none when a changed file could be glued to the old part unnoticed."""
        if not offset:
            return {}
        try:
            validator = json.loads(self.validator_file.read_text())["validator"]
        except (OSError, ValueError, KeyError):
            validator = ""
        if validator:
            return {"Range": f"bytes={offset}-", "If-Range": validator}
        return {"Range": f"bytes={offset}-"} if self.sha256 else {}

    def _remember(self, response: httpx.Response) -> None:
        etag = response.headers.get("ETag", "")
        # A weak ETag says nothing about bytes, so it must not be used in If-Range (RFC 9110 13.1.5).
        validator = response.headers.get("Last-Modified", "") if not etag or etag.startswith("W/") else etag
        write_whole(self.validator_file, json.dumps({"validator": validator}))

    def _check_status(self, response: httpx.Response) -> None:
        status = response.status_code
        said = f"`{self.shown_url}` answered {status} {response.reason_phrase}".rstrip()
        if status in TRANSIENT_STATUS:
            raise _Transient(said, retry_after_s(response))
        if status in (200, 206):
            return
        hints = {
            401: "give a token by `auth_secret`",
            403: "the token in `auth_secret` has no right to this file, or none was given",
            404: "look at the address in a browser",
            407: "the proxy wants a login",
            410: "the file was removed for good",
        }
        hint = f"\n\nhint: {hints[status]}" if status in hints else ""
        raise StepError(f"{said}, wanted 200{hint}")

    def _check_range(self, response: httpx.Response, part: BinaryIO, offset: int) -> None:
        content_range = response.headers.get("Content-Range", "")
        if not content_range.startswith(f"bytes {offset}-"):
            self._restart(part)
            raise _Transient(f"got the range `{content_range}`, wanted one from byte {offset}", 0)
        asked = response.request.headers.get("If-Range", "")
        if asked.startswith('"') and response.headers.get("ETag", asked) != asked:
            self._restart(part)
            raise _Transient("the file has changed, and the server sent a part of the new one", 0)

    def _check_space(self, total: int | None, offset: int) -> None:
        free = shutil.disk_usage(self.target.parent).free
        if total is not None and total - offset > free:
            raise StepFailed(
                f"`{self.target.parent}` has {free} bytes free, {total - offset} are needed\n\n"
                "hint: make room, or choose another disk by `output`"
            )

    def _restart(self, part: BinaryIO) -> int:
        """Forget what has arrived; the new offset."""
        part.truncate(0)
        part.seek(0)
        self.validator_file.unlink(missing_ok=True)
        self._resumed = False
        return 0

    def _discard(self) -> None:
        self.part.unlink(missing_ok=True)
        self.validator_file.unlink(missing_ok=True)

    def _hash(self, part: BinaryIO) -> str:
        digest = hashlib.sha256()
        part.seek(0)
        while chunk := part.read(1 << 20):
            self.context.check_cancelled()
            digest.update(chunk)
        return digest.hexdigest()

    def _wait(self, asked_s: float | None, fruitless: int, reason: str) -> None:
        backoff_s = min(30.0, self.backoff_s * 2 ** max(0, fruitless - 1)) * random.uniform(0.75, 1.25)
        wait_s = backoff_s if asked_s is None else asked_s
        if wait_s > self.longest_wait_s:
            raise self._give_up(f"{reason}; the server asks to wait {wait_s:.0f} s", 1)
        self.context.log(f"{reason}; trying again in {wait_s:.1f} s")
        self._wake.wait(wait_s)
        self.context.check_cancelled()

    def _hang_up(self) -> None:
        """End what the transfer waits for; called from another thread."""
        self._wake.set()
        if self._socket is not None:
            # It may be closed by now.
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def _give_up(self, reason: str, tries: int) -> StepFailed:
        return StepFailed(
            f"`{self.shown_url}` could not be downloaded after {tries} {'try' if tries == 1 else 'tries'}: {reason}\n\n"
            f"hint: what has arrived is kept; a later attempt goes on at byte {self.part.stat().st_size}"
        )

    def _client(self) -> httpx.Client:
        client = http_client(self.context.env)
        client.event_hooks = {"request": [self._keep_secret_at_home]}
        return client

    def _keep_secret_at_home(self, request: httpx.Request) -> None:
        """Drop our own headers where a redirect leads away; httpx does so only for `Authorization`."""
        home, there = httpx.URL(self.url), request.url
        if (home.host, home.port) != (there.host, there.port) or (home.scheme, there.scheme) == ("https", "http"):
            for name in self.headers:
                request.headers.pop(name, None)

    @contextlib.contextmanager
    def _locked_part(self) -> Iterator[BinaryIO]:
        """The part file, ours alone: two transfers that append to one file would spoil it."""
        with self.part.open("a+b") as part:
            try:
                fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Between our open and our lock another one may have finished and renamed this very file.
                ours = self.part.exists() and self.part.stat().st_ino == os.fstat(part.fileno()).st_ino
            except BlockingIOError:
                ours = False
            if not ours:
                raise StepFailed(f"another download of `{self.shown_url}` to `{self.target}` is running")
            yield part

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StepFailed(
                    f"the disk of `{self.target.parent}` is full\n\nhint: make room, or choose another by `output`"
                ) from error
            if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG):
                raise StepError(f"`{self.target}` cannot be written: {error.strerror}") from error
            raise


def _total(response: httpx.Response) -> int | None:
    """Size of the whole file, None when the server does not say."""
    size = response.headers.get("Content-Range", "").rpartition("/")[2]
    if response.status_code == 200:
        size = response.headers.get("Content-Length", "")
    return int(size) if size.isdigit() else None
