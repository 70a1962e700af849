"""A connection to a server of draws, with concurrent requests and a limit on retries."""

import re
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
from tqdm.auto import tqdm

from bayestune.errors import ConfigError, ServingError
from bayestune.serving.wire import Question

_AGAIN = {429, 502, 503}  # the server is busy, or still loading the model
_CONNECT = 10.0
"""Seconds to wait for a connection."""


def check_api_key(api_key: str | None) -> None:
    """Raise a ConfigError for a key that cannot be sent in a header."""
    if api_key is not None and not re.fullmatch(r"[!-~]+", api_key):
        raise ConfigError("api_key: found blanks or characters beyond ASCII, expected printable ones.")


class Connection:
    """Sends JSON requests to one server.

    Args:
        url: the server's URL.
        api_key: sent as a bearer token.
        concurrency: largest number of concurrent requests.
        timeout: seconds to wait for an answer.
        retries: how often a request is repeated if the server is unreachable or busy, after 0.2 s, 0.4 s, ....
    """

    def __init__(self, url: str, *, api_key: str | None, concurrency: int, timeout: float, retries: int) -> None:
        check_api_key(api_key)
        self.url, self.retries, self.timeout = url.rstrip("/"), retries, timeout
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        limits = httpx2.Limits(max_connections=concurrency)
        try:
            self._client = httpx2.Client(
                base_url=self.url,
                headers=headers,
                timeout=httpx2.Timeout(timeout, connect=min(timeout, _CONNECT)),
                limits=limits,
                trust_env=False,
            )
        except httpx2.InvalidURL as error:
            raise ConfigError(f"url: found {url!r}, expected one such as http://127.0.0.1:8080 ({error}).") from error
        self._pool = ThreadPoolExecutor(concurrency, thread_name_prefix="bayestune-client")

    def ask(self, question: Question) -> Any:
        """Return the JSON reply to one request.

        Raises:
            ServingError: the server is unreachable, does not answer in time, or refuses the request.
        """
        fault = ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(0.1 * 2**attempt)
            try:
                if question.body is None:
                    reply = self._client.get(question.path)
                else:
                    reply = self._client.post(question.path, json=question.body)
            except httpx2.ReadTimeout as error:  # asked again, a slow server would have twice as much to do
                raise ServingError(
                    f"{self.url}: found no answer within {self.timeout:g} s, expected one; if the server is only "
                    "slow, raise `timeout` of bt.serving.Client, or lower its `concurrency`."
                ) from error
            except httpx2.TransportError as error:
                fault = f"no connection ({str(error) or type(error).__name__})"
            else:
                if reply.status_code == 500 and question.refusable:
                    return {}
                if reply.status_code not in _AGAIN:
                    return self._json(question, reply)
                fault = f"status {reply.status_code}"
        raise ServingError(
            f"{self.url}: found {fault} in {self.retries + 1} tries, expected a server of draws; check that it runs, "
            "or start it again with `bayestune serve`."
        )

    def _json(self, question: Question, reply: httpx2.Response) -> Any:
        if reply.status_code in (401, 403):
            raise ServingError(f"{self.url}: found the API key refused, expected one that fits; pass it as api_key.")
        try:
            found = reply.json()
        except ValueError:
            found = None
        if not reply.is_success or found is None:
            shown = " ".join(reply.text.split())[:200]
            raise ServingError(f"{self.url}{question.path}: found status {reply.status_code}: {shown}")
        return found

    def ask_all(self, questions: Sequence[Question], *, progress: bool = False) -> list[Any]:
        """Return the replies, in order; the first failure cancels the requests that are not sent yet."""
        sent = [self._pool.submit(self.ask, question) for question in questions]
        shown: Iterable[Any] = tqdm(sent, desc="ask", unit="request", disable=not progress)
        try:
            return [future.result() for future in shown]
        finally:
            for future in sent:
                future.cancel()

    def close(self) -> None:
        """Close all connections."""
        self._pool.shutdown(cancel_futures=True)
        self._client.close()
