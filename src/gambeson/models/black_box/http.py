"""HTTP endpoints as black boxes.

The protocol, which takes a server a few lines:

* Request: ``POST URL``, ``Content-Type: application/x-npy``; the body is a NumPy ``.npy`` file of float32,
  (N, C, H, W), pixels in [0, 1].
* Answer: status 200 and scores (N, K), either a ``.npy`` file (recognised by its first bytes) or JSON: nested lists, or
  an object with them under ``scores``, ``logits`` or ``probabilities``; or, if only the top class is returned, integers
  (N,), in an object under ``classes``.
* Status 408, 425, 429 and 5xx, time-outs and lost connections are retried; any other status is an error.
"""

from __future__ import annotations

import io
import json
import math
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gambeson.base import UserError
from gambeson.models.black_box.base import BlackBox

if TYPE_CHECKING:  # imported where a server is asked: who names models or loads one from a file does not wait for it
    import httpx2 as httpx

_KEYS = ("scores", "logits", "probabilities", "classes")
_TURNED_AWAY = (408, 425, 429, 503)
"""Retried without counting: the server says that it has not processed the images."""
_LARGEST = 2**28
"""Maximum size of a response, in bytes."""
_LONGEST = 60.0
"""Maximum pause between two attempts, in seconds."""


class _Lost(Exception):
    """A failed attempt that can be retried, the wait the server requested, and whether it may have been answered."""

    def __init__(self, reason: str, wait: float = 0.0, *, answered: bool = True) -> None:
        super().__init__(reason)
        self.wait, self.answered = wait, answered


class HttpModel(BlackBox):
    """A server as a black box; see the module docstring for the protocol.

    Thread-safe; connections are kept open. Each attempt that the server may have answered counts against the budget:
    time-outs, lost connections, a status 5xx other than 503. Attempts that were certainly not answered do not count: no
    connection, status 408, 425, 429, 503, or a refusal.

    Args:
        url: ``http://…`` or ``https://…``.
        timeout: seconds allowed for the connection, for the first byte, and for the rest of the response.
        retries: attempts after the first one, for each request.
        pause: seconds before the first retry, doubled for each further one, up to a minute. A longer ``Retry-After`` of
            the server is respected, up to a minute.
        headers: sent with every request, such as an ``Authorization``.
        workers: concurrent requests.
        keywords: see :class:`BlackBox`; ``batch`` is 64 unless given.

    Attributes:
        requests: attempts, including failed ones.
        retried: retries.
        seconds: time spent in requests and pauses, over all threads.

    Raises:
        UserError: an invalid URL. From ``forward``: the server refused (status 3xx or 4xx), returned something else, or
            did not answer after all retries.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 30.0,
        retries: int = 4,
        pause: float = 0.5,
        headers: dict[str, str] | None = None,
        workers: int = 4,
        **keywords: Any,
    ) -> None:
        super().__init__(**{"batch": 64} | keywords)
        import httpx2 as httpx

        try:
            self.url = httpx.URL(url)
        except httpx.InvalidURL:
            self.url = httpx.URL()
        port = 80 if self.url.port is None else self.url.port
        if self.url.scheme not in ("http", "https") or not self.url.host or not 0 < port < 2**16:
            raise UserError(f"{url!r} is no address of a server: write http://HOST:PORT/PATH")
        if not (timeout > 0 and retries >= 0 and pause >= 0 and workers >= 1):
            raise UserError(
                f"timeout = {timeout}, retries = {retries}, pause = {pause}, workers = {workers}: expected none below "
                "0, and one worker at least"
            )
        self.workers, self.timeout, self.retries, self.pause = workers, timeout, retries, pause
        self.requests = 0
        self.retried = 0
        self.seconds = 0.0
        self._client = httpx.Client(
            headers={"Content-Type": "application/x-npy", "Accept": "application/json, application/x-npy"},
            timeout=httpx.Timeout(timeout, pool=None),
            limits=httpx.Limits(max_connections=None),
            trust_env=self.url.host not in ("localhost", "127.0.0.1", "::1"),  # no proxy for localhost
        )
        self._client.headers.update(headers or {})

    @property
    def title(self) -> str:
        """Name of the box in messages: the URL without user name, password and query."""
        return str(self.url.copy_with(username="", password="", query=None, fragment=None))

    def _ask(self, images: torch.Tensor) -> Any:
        body = io.BytesIO()
        np.lib.format.write_array(body, images.contiguous().numpy(), allow_pickle=False)
        began = time.monotonic()
        try:
            return self._answer(self._insist(body.getvalue(), len(images)))
        finally:
            with self._lock:
                self.seconds += time.monotonic() - began

    def _insist(self, body: bytes, count: int) -> bytes:
        for attempt in range(self.retries + 1):
            with self._lock:
                self.requests += 1
                self.retried += attempt > 0
            try:
                return self._attempt(body)
            except UserError:
                self._release(count)  # refused
                raise
            except _Lost as lost:
                if attempt == self.retries:
                    if not lost.answered:
                        self._release(count)
                    raise UserError(
                        f"{self.title} gave no answer in {attempt + 1} attempts (the last: {lost}): check the server, "
                        "or allow more retries or a longer timeout"
                    ) from None
                if lost.answered:
                    self._claim(count)
                time.sleep(min(_LONGEST, max(self.pause * 2**attempt, lost.wait)))
        raise AssertionError("unreachable")

    def _attempt(self, body: bytes) -> bytes:
        import httpx2 as httpx

        try:
            with self._client.stream("POST", self.url, content=body) as response:
                if response.status_code == 200:
                    return self._received(response)
                told = b""
                with suppress(httpx.RequestError):
                    told = next(response.iter_bytes(200), b"")
        except httpx.ConnectError as error:
            raise _Lost(str(error), answered=False) from None
        except httpx.TimeoutException as error:
            answered = not isinstance(error, httpx.ConnectTimeout)
            raise _Lost(f"no answer within {self.timeout:g} s", answered=answered) from None
        except httpx.RequestError as error:
            raise _Lost(str(error) or type(error).__name__) from None
        status, words = response.status_code, " ".join(told.decode(errors="replace").split())
        words = f"status {status}, {words!r}" if words else f"status {status}"
        if status >= 500 or status in _TURNED_AWAY:
            raise _Lost(words, _wait(response.headers), answered=status not in _TURNED_AWAY)
        raise UserError(
            f"{self.title} refused the images with {words}: see what it expects; POST of a .npy file, float32 "
            "(N, C, H, W), was sent"
        )

    def _received(self, response: httpx.Response) -> bytes:
        """Read an answer, which may not trickle in for longer than the time-out."""
        import httpx2 as httpx

        latest, content = time.monotonic() + self.timeout, bytearray()
        for piece in response.iter_bytes():
            content += piece
            if time.monotonic() > latest:
                raise httpx.ReadTimeout("the answer trickles in")
            if len(content) > _LARGEST:
                raise UserError(f"{self.title} answered more than {_LARGEST} bytes: expected scores")
        return bytes(content)

    def _answer(self, content: bytes) -> Any:
        expected = (
            "expected scores (N, K) as a .npy file, nested lists in JSON, or under `scores` in JSON; or `classes` (N,)"
        )
        try:
            if content.startswith(b"\x93NUMPY"):
                return np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
            found = json.loads(content)
        except (ValueError, UnicodeDecodeError, EOFError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{self.title} answered what is neither JSON nor .npy ({reason}): {expected}") from None
        if isinstance(found, dict):
            key = next((key for key in _KEYS if key in found), None)
            if key is None:
                raise UserError(f"{self.title} answered JSON with the keys {', '.join(found) or 'none'}: {expected}")
            found = found[key]
        return found


def _wait(headers: httpx.Headers) -> float:
    try:
        seconds = float(headers.get("Retry-After", "0"))
    except ValueError:  # a date, which is also allowed; use the default pause
        return 0.0
    return seconds if math.isfinite(seconds) and seconds > 0 else 0.0
