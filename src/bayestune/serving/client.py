"""`Client`: predict with a posterior whose draws are on a server. This module imports without torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bayestune.errors import ConfigError, ServingError
from bayestune.files import file_sha256
from bayestune.serving.connection import Connection
from bayestune.serving.record import PROBE, SERVED, TOKENIZER, Served, ServedDraw, read_served
from bayestune.serving.wire import WIRES, Adapter, Asked, LlamaCpp, Question, Step, Vllm, Wire, told

if TYPE_CHECKING:
    from bayestune.tasks import AnyRow, Prediction
    from bayestune.tasks.causal import CausalChoice

_SAME = 1e-2
"""Largest difference in nats between a draw's log-probabilities and those in the record, for other machines.

Draws that differ by less are distinguished only by the hash of their file."""
_TENSORS = "adapter_model.safetensors"


class Client:
    """The predictive distribution of a posterior whose draws are on a running server.

    The client asks every draw separately and averages the probabilities:
    ``p(y|x) = 1/K sum_k softmax(log p(choice | x, theta_k) / T)`` (BLoB, arXiv 2406.11675, section 3.4). On
    construction the client checks that the server holds every draw of the record, and that each changes the answers.

    Args:
        served: the `served.json` that `bayestune serve` wrote, or its folder; or the URL of a server. With a URL,
            every adapter counts as a draw, and questions need token ids or a task.
        api_key: the server's API key.
        concurrency: largest number of concurrent requests.
        timeout: seconds to wait for an answer, including its time in the server's queue.
        retries: how often a request is repeated if the server is unreachable or busy.

    Raises:
        ConfigError: there is no record, or it is incomplete.
        ServingError: the server is down, or lacks a draw, or a draw differs from the record or has no effect.

    Example:
        >>> client = Client("served/served.json")  # doctest: +SKIP
        >>> client.predict(rows).probs  # doctest: +SKIP
    """

    def __init__(
        self,
        served: str | Path,
        *,
        api_key: str | None = None,
        concurrency: int = 8,
        timeout: float = 600.0,
        retries: int = 2,
    ) -> None:
        if concurrency < 1 or timeout <= 0 or retries < 0:
            raise ConfigError(
                f"Client: found concurrency={concurrency}, timeout={timeout}, retries={retries}, expected at least 1, "
                "above 0 and at least 0."
            )
        self.record: Served | None = None
        self.folder: Path | None = None
        if not str(served).startswith(("http://", "https://")):
            self.record, self.folder = read_served(served)
        url = str(served) if self.record is None else self.record.url
        self._connection = Connection(url, api_key=api_key, concurrency=concurrency, timeout=timeout, retries=retries)
        self._task: CausalChoice | None = None
        try:
            self.check()
        except BaseException:
            self.close()
            raise

    @property
    def draws(self) -> int:
        """Number of draws; 0 for the mean alone."""
        return len(self.adapters) if self.record is None else self.record.draws

    @property
    def seed(self) -> int:
        """Seed of the draws; 0 if there is no record."""
        return 0 if self.record is None else self.record.seed

    def check(self) -> None:
        """Check the server again, as on construction.

        Raises:
            ServingError: as on construction.
        """
        try:
            self._wire, there = self._found()
        except (KeyError, TypeError, IndexError, ValueError, StopIteration) as error:
            raise ServingError(
                f"{self._connection.url}: found another program, expected llama.cpp's server or vLLM."
            ) from error
        self.adapters = tuple(there) if self.record is None else self._recorded(self.record, there)
        self._check_probes()

    def _found(self) -> tuple[Wire, list[Adapter]]:
        """Return the protocol of the server, and its adapters."""
        listed = self._connection.ask(Question(path="/v1/models"))
        if listed["data"][0].get("owned_by") == "llamacpp":
            there = LlamaCpp().adapters(self._connection.ask(LlamaCpp.listing))
            anchor = self._connection.ask(LlamaCpp().tokenize(" a"))["tokens"][-1]
            wire: Wire = LlamaCpp(
                count=len(there), vocabulary=listed["data"][0]["meta"]["n_vocab"], anchor=int(anchor)
            )
        else:
            base = next(entry["id"] for entry in listed["data"] if entry.get("parent") is None)
            wire = Vllm(base=base, vocabulary=0 if self.record is None else self.record.vocabulary)
            there = wire.adapters(listed)
        if not there:
            raise ServingError(f"{self._connection.url}: found no adapter, expected a server of draws.")
        expected = wire.name if self.record is None else self.record.backend
        if wire.name != expected:
            raise ServingError(f"{self._connection.url}: found {wire.name}, expected {WIRES[expected].name}.")
        return wire, there

    def _recorded(self, record: Served, there: list[Adapter]) -> tuple[Adapter, ...]:
        """Return the adapters of the record, after checking that the server loaded them from the same files."""
        loaded = {adapter.key: adapter for adapter in there}
        found = []
        for draw in record.adapters:
            adapter = loaded.get(draw.key)
            if adapter is None:
                raise ServingError(
                    f"{self._connection.url}: found no {draw.name} (id {draw.key!r}) among its {len(there)} adapters, "
                    "expected every draw of the record; serve the run again."
                )
            self._check_file(draw, adapter)
            found.append(adapter)
        return tuple(found)

    def _check_file(self, draw: ServedDraw, adapter: Adapter) -> None:
        if Path(adapter.path).name != Path(draw.path).name:
            raise ServingError(
                f"{self._connection.url}: found {Path(adapter.path).name} under id {draw.key!r}, expected "
                f"{Path(draw.path).name}, as the record has it; serve the run again."
            )
        file = Path(adapter.path) / _TENSORS if Path(adapter.path).is_dir() else Path(adapter.path)
        if file.is_file() and file_sha256(file) != draw.sha256:  # on another machine there is no file to compare
            raise ServingError(
                f"{file}: found another sha256 than the record has for {draw.name}; serve the run again."
            )

    def probes(self) -> NDArray[np.float64]:
        """Return the log-probabilities [1 + adapters, tokens] of the tokens of `PROBE`; the first row is the base."""
        tokens = [int(token) for token in self._connection.ask(self._wire.tokenize(PROBE))["tokens"]]
        asked, keys = Asked(tokens[:1], [tokens[1:]]), [None, *(adapter.key for adapter in self.adapters)]
        known = self._known([asked], keys)
        return np.array([[known[k, 0][step] for step in asked.steps(0)] for k in range(len(keys))])

    def _check_probes(self) -> None:
        """Raise an error unless every draw answers as in the record, and differently from the base.

        An adapter can load without effect, and a file can have the right name and the wrong content.
        """
        base, *draws = self.probes()
        for place, (adapter, draw) in enumerate(zip(self.adapters, draws, strict=True)):
            if np.array_equal(base, draw):
                raise ServingError(
                    f"{self._connection.url}: adapter {adapter.key!r} answers exactly as the base model does, "
                    "expected another answer: it was loaded, and has no effect."
                )
            if self.record is None:
                continue
            before = self.record.adapters[place].probe
            if len(before) != len(draw) or np.abs(np.array(before) - draw).max() > _SAME:
                raise ServingError(
                    f"{self._connection.url}: adapter {adapter.key!r} answers a first question differently than "
                    f"when {SERVED} was written, expected the same; serve the run again."
                )

    def log_probs(self, asked: Sequence[Asked], *, progress: bool = False) -> NDArray[np.float64]:
        """Return the log-probability of each answer under each draw.

        Args:
            asked: the rows, as questions.
            progress: show a bar on stderr.

        Returns:
            Log-probabilities [draws, rows, answers] in nats; -inf for answers that a row lacks.

        Raises:
            ServingError: a draw did not answer, or left out a token; the others are not averaged without it.
        """
        return self._log_probs(asked, [adapter.key for adapter in self.adapters], progress=progress)

    def log_probs_of(self, asked: Sequence[Asked], key: int | str | None) -> NDArray[np.float64]:
        """Return `log_probs` [rows, answers] under one adapter; None is the base model."""
        return self._log_probs(asked, [key])[0]

    def _log_probs(
        self, asked: Sequence[Asked], keys: Sequence[int | str | None], *, progress: bool = False
    ) -> NDArray[np.float64]:
        known = self._known(asked, keys, progress=progress)
        width = max((len(each.continuations) for each in asked), default=0)
        result = np.full((len(keys), len(asked), width), -np.inf)
        for k, row in known:
            for choice in range(len(asked[row].continuations)):
                result[k, row, choice] = sum(known[k, row][step] for step in asked[row].steps(choice))
        return result

    def _known(
        self, asked: Sequence[Asked], keys: Sequence[int | str | None], *, progress: bool = False
    ) -> dict[tuple[int, int], dict[Step, float]]:
        """Return the log-probability of every answer token, by (index of the key, index of the row)."""
        known: dict[tuple[int, int], dict[Step, float]] = {
            (k, row): {} for k in range(len(keys)) for row in range(len(asked))
        }
        questions = [(k, row, q) for k, row in known for q in self._wire.questions(keys[k], asked[row])]
        replies = self._connection.ask_all([question for *_, question in questions], progress=progress)
        withheld: dict[tuple[int, int], list[Step]] = {}
        for (k, row, question), reply in zip(questions, replies, strict=True):
            found = self._wire.read(question, reply)
            if found is None:
                withheld.setdefault((k, row), []).extend(question.steps)
            else:
                known[k, row] |= found
        for (k, row), steps in withheld.items():
            known[k, row] |= self._by_distributions(steps, keys[k])
        return known

    def _by_distributions(self, steps: Sequence[Step], key: int | str | None) -> dict[Step, float]:
        """Return the log-probabilities of tokens that the server withholds, read from whole distributions."""
        contexts = list(dict.fromkeys(before for before, _ in steps))
        replies = self._connection.ask_all([self._wire.whole(key, context) for context in contexts])
        found = {context: self._wire.read_whole(reply) for context, reply in zip(contexts, replies, strict=True)}
        return {step: told(found[step[0]], step[1]) for step in steps}

    def distributions(self, context: Sequence[int]) -> NDArray[np.float64]:
        """Return the log-probabilities [draws, tokens] of the whole vocabulary after `context`, in nats.

        Raises:
            ServingError: a draw did not answer, or left out a token.
        """
        questions = [self._wire.whole(adapter.key, context) for adapter in self.adapters]
        found = [self._wire.read_whole(reply) for reply in self._connection.ask_all(questions)]
        return np.array([[each[token] for token in range(len(each))] for each in found])

    @property
    def task(self) -> "CausalChoice":
        """The task of the record.

        Raises:
            ConfigError: the client was made from a URL alone.
        """
        if self.record is None or self.folder is None:
            raise ConfigError("Client: found no task at a URL alone; pass a task, or the served.json of the server.")
        if self._task is None:
            from bayestune.serving.asking import task_of

            self._task = task_of(self.record.task, self.folder / TOKENIZER)
        return self._task

    def predict(
        self, rows: "Sequence[AnyRow]", *, task: "CausalChoice | None" = None, progress: bool = False
    ) -> "Prediction":
        """Predict `rows` like `bayestune.predict`, but with the draws on the server. This needs torch.

        Args:
            rows: at least one; labels are not needed.
            task: the task of the rows; by default that of the record. Without a record, no temperature is applied.
            progress: show a bar on stderr.

        Raises:
            ConfigError: there is no record, and no `task`.
            DataError: there are no rows, or a row cannot be used; names the row.
            ServingError: as `log_probs`.
        """
        from bayestune.serving.asking import asked_rows, prediction

        task = task or self.task
        examples, asked = asked_rows(task, rows)
        found: Any = self.log_probs(asked, progress=progress)
        temperature = 1.0 if self.record is None else self.record.temperature
        return prediction(task, rows, examples, found, draws=self.draws, seed=self.seed, temperature=temperature)

    def close(self) -> None:
        """Close the connections."""
        self._connection.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
