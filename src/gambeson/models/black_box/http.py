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
import math
import os
import re
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import parse_qsl, urlsplit

import numpy as np
import torch
from pydantic import AfterValidator, Field

from gambeson.base import Config, Number, UserError, one_line
from gambeson.base.files import parse_json
from gambeson.models.black_box.base import BlackBox, Output

if TYPE_CHECKING:  # imported where a server is asked: who names models or loads one from a file does not wait for it
    import httpx2 as httpx

_KEYS = ("scores", "logits", "probabilities", "classes")
_TURNED_AWAY = (408, 425, 429, 503)
"""Retried without counting: the server says that it has not processed the images."""
_PARSING = threading.Lock()
"""Python before 3.11.9 may fail where several threads parse the header of an array at once."""
_LARGEST = 2**28
"""Maximum size of a response, in bytes."""
_LONGEST = 60.0
"""Maximum pause between two attempts, in seconds."""


class _Lost(Exception):
    """A failed attempt that can be retried, the wait the server requested, and whether it may have been answered."""

    def __init__(self, reason: str, wait: float = 0.0, *, answered: bool = True) -> None:
        super().__init__(reason)
        self.wait, self.answered = wait, answered


_VARIABLE = re.compile(r"\$\{(\w+)\}")
_SECRET = re.compile(r"auth|cookie|key|passw|secret|signature|token", re.IGNORECASE)


class HttpSettings(Config):
    """How a server is asked. Nothing of this changes an answer, so a run may be resumed with other values."""

    timeout: Annotated[Number, Field(gt=0)] = 30.0
    """Seconds allowed for the connection, for the first byte, and for the rest of the response."""
    retries: Annotated[int, Field(ge=0)] = 4
    """Attempts after the first one, for each request."""
    pause: Annotated[Number, Field(ge=0)] = 0.5
    """Seconds before the first retry, doubled for each further one, up to a minute. A longer ``Retry-After`` of the
    server is respected, up to a minute."""
    workers: Annotated[int, Field(ge=1)] = 4
    """Concurrent requests."""
    batch: Annotated[int, Field(ge=1)] = 64
    """Maximum number of images per request."""
    token_env: str | None = None
    """Name of the environment variable whose value is sent as ``Authorization: Bearer VALUE``."""
    headers: dict[str, str] = Field(default_factory=dict)
    """Sent with every request; ``${NAME}`` in a value is replaced by that environment variable."""

    def sent(self) -> dict[str, str]:
        """Return the headers with the environment's values.

        Raises:
            UserError: a variable is not set, or a header has characters that HTTP does not allow.
        """
        token = {} if self.token_env is None else {"Authorization": f"Bearer ${{{self.token_env}}}"}
        found = {}
        for name, value in (self.headers | token).items():
            found[name] = _VARIABLE.sub(_environment, value)
            if not re.fullmatch(r"[\w!#$%&'*+.^`|~-]+", name, re.ASCII) or not re.fullmatch(r"[ -~]*", found[name]):
                raise UserError(f"the header {name!r} has characters that HTTP does not allow: expected plain ASCII")
        return found


def _environment(found: re.Match[str]) -> str:
    value = os.environ.get(found[1], "").strip()
    if not value:
        raise UserError(f"the environment variable {found[1]} is not set: set it to what the server expects, and retry")
    return value


def refuse_secrets(url: str) -> None:
    """Refuse a URL with a password or a key as the name of a model, which is stored with every run and printed.

    Raises:
        UserError: it has one.
    """
    try:
        parts = urlsplit(url)
    except ValueError:  # the client says what is wrong with it
        return
    secret = next((name for name, _ in parse_qsl(parts.query, True) if _SECRET.search(name)), None)
    found = "a user or a password" if "@" in parts.netloc else None if secret is None else f"a {secret}"
    if found is not None:
        raise UserError(
            f"the URL of the model at {parts.hostname} has {found} in it, which would be stored and printed with every "
            "result: leave it out, and give it by --http token_env=VARIABLE, where the environment variable has it"
        )


def _no_secrets(http: HttpSettings | None) -> HttpSettings | None:
    for name, value in ({} if http is None else http.headers).items():
        if _SECRET.search(name) and not _VARIABLE.search(value):
            raise ValueError(
                f"the header {name} would be stored with the run: write {name}=${{NAME}} and set the environment "
                "variable NAME, or give token_env"
            )
    return http


StoredHttp = Annotated[HttpSettings | None, AfterValidator(_no_secrets)]
"""How a server is asked, in the settings of a run; secrets stay in the environment."""


class HttpModel(BlackBox):
    """A server as a black box; see the module docstring for the protocol.

    Thread-safe; connections are kept open. Each attempt that the server may have answered counts against the budget:
    time-outs, lost connections, a status 5xx other than 503. Attempts that were certainly not answered do not count: no
    connection, status 408, 425, 429, 503, or a refusal.

    Args:
        url: ``http://…`` or ``https://…``.
        output: see :class:`BlackBox`.
        budget: see :class:`BlackBox`.
        classes: see :class:`BlackBox`.
        settings: fields of :class:`HttpSettings`.

    Attributes:
        requests: attempts, including failed ones.
        retried: retries.
        seconds: time spent in requests and pauses, over all threads.

    Raises:
        UserError: an invalid URL or setting. From ``forward``: the server refused (status 3xx or 4xx), returned
            something else, or did not answer after all retries.
    """

    def __init__(
        self,
        url: str,
        *,
        output: Output = "auto",
        budget: int | None = None,
        classes: int | None = None,
        **settings: Any,
    ) -> None:
        import httpx2 as httpx

        self.settings = HttpSettings(**settings)
        super().__init__(output=output, budget=budget, classes=classes, batch=self.settings.batch)
        try:
            self.url = httpx.URL(url)
        except httpx.InvalidURL:
            self.url = httpx.URL()
        port = 80 if self.url.port is None else self.url.port
        if self.url.scheme not in ("http", "https") or not self.url.host or not 0 < port < 2**16:
            raise UserError(f"{url!r} is no address of a server: write http://HOST:PORT/PATH")
        self.workers = self.settings.workers
        self.requests = 0
        self.retried = 0
        self.seconds = 0.0
        self._client = httpx.Client(
            headers={"Content-Type": "application/x-npy", "Accept": "application/json, application/x-npy"},
            timeout=httpx.Timeout(self.settings.timeout, pool=None),
            limits=httpx.Limits(max_connections=None),
            trust_env=self.url.host not in ("localhost", "127.0.0.1", "::1"),  # no proxy for localhost
        )
        self._client.headers.update(self.settings.sent())

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
        for attempt in range(self.settings.retries + 1):
            with self._lock:
                self.requests += 1
                self.retried += attempt > 0
            try:
                return self._attempt(body)
            except UserError:
                self._release(count)  # refused
                raise
            except _Lost as lost:
                if attempt == self.settings.retries:
                    if not lost.answered:
                        self._release(count)
                    raise UserError(
                        f"{self.title} gave no answer in {attempt + 1} attempts (the last: {lost}): check the server, "
                        "or allow more retries or a longer timeout"
                    ) from None
                if lost.answered:
                    self._claim(count)
                time.sleep(min(_LONGEST, max(self.settings.pause * 2**attempt, lost.wait)))
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
            raise _Lost(f"no answer within {self.settings.timeout:g} s", answered=answered) from None
        except httpx.RequestError as error:
            raise _Lost(str(error) or type(error).__name__) from None
        status, words = response.status_code, " ".join(told.decode(errors="replace").split())
        words = f"status {status}, {words!r}" if words else f"status {status}"
        if status >= 500 or status in _TURNED_AWAY:
            raise _Lost(words, _wait(response.headers), answered=status not in _TURNED_AWAY)
        hint = " (a token: token_env or headers)" if status in (401, 403) else ""
        raise UserError(
            f"{self.title} refused the images with {words}: see what it expects{hint}; POST of a .npy file, float32 "
            "(N, C, H, W), was sent"
        )

    def _received(self, response: httpx.Response) -> bytes:
        """Read an answer, which may not trickle in for longer than the time-out."""
        import httpx2 as httpx

        latest, content = time.monotonic() + self.settings.timeout, bytearray()
        for piece in response.iter_bytes():
            content += piece
            if time.monotonic() > latest:
                raise httpx.ReadTimeout("the answer trickles in")
            if len(content) > _LARGEST:
                raise UserError(
                    f"{self.title} answered more than {_LARGEST} bytes: expected scores; set a smaller batch"
                )
        return bytes(content)

    def _answer(self, content: bytes) -> Any:
        expected = (
            "expected scores (N, K) or (N, K, H, W) as a .npy file, nested lists in JSON, or under `scores` in JSON; "
            "or `classes` (N,) or (N, H, W)"
        )
        try:
            if content.startswith(b"\x93NUMPY"):
                with _PARSING:
                    return np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
            found = parse_json(content)
        except (ValueError, UnicodeDecodeError, EOFError) as error:
            raise UserError(
                f"{self.title} answered what is neither JSON nor .npy ({one_line(error)}): {expected}"
            ) from None
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
