"""Evaluate a run on the tasks of lm-evaluation-harness. This is the only file that imports lm_eval."""

import importlib.metadata
import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bayestune.errors import BayestuneWarning, ConfigError, DataError, DrawError, TaskError, one_line
from bayestune.experiment.fitting import autocast
from bayestune.experiment.folder import POSTERIOR
from bayestune.experiment.record import hardware, versions
from bayestune.experiment.trained import Run
from bayestune.files import MANIFEST, file_sha256
from bayestune.inference.continuations import Continuation, continuation_log_probs
from bayestune.sampling import Posterior
from bayestune.storage.manifest import TENSOR_FILE

try:
    from lm_eval.evaluator import simple_evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError as error:
    message = "lm-eval: found no package lm_eval, expected it installed; run: pip install '.[eval]'"
    raise ModuleNotFoundError(message, name=error.name) from error

_KEPT = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better")
"""The parts of lm-eval's results that are kept. The rest describes the machine, or follows from the task versions."""


class PosteriorLM(HFLM):
    """Wrap a posterior as a model of lm-evaluation-harness that averages sequence probabilities over draws.

    ``log p(y | x) = logsumexp_k log p(y | x, theta_k) - log K`` for a context x and a continuation y, with the same K
    draws for every request. With ``draws=0`` it answers as lm-eval's `hf` does with the exported mean (``peft=``).

    - `is_greedy` is whether every token of y is the most probable one under this mixture, given the tokens before it.
    - A document (`loglikelihood_rolling`) is one sequence: each draw's log-probabilities of its windows are added up
      before the draws are averaged, so the average does not depend on where the windows are cut.
    - Nothing is generated: tasks of the type `generate_until` are refused.

    The temperature of the posterior is not applied, because it was fitted to the choices of its own task.

    Args:
        posterior: a posterior of a causal language model, whose draws are weights.
        tokenizer: the model's tokenizer.
        draws: number of draws; 0 for the mean.
        seed: seed of the draws.
        batch_size: texts per forward pass.

    Raises:
        ConfigError: `batch_size` is less than 1, or the model has no language-model head.
        DrawError: the posterior cannot give that many draws, or draws only answers, as linearized posteriors do.
    """

    def __init__(
        self,
        posterior: Posterior,
        tokenizer: PreTrainedTokenizerBase,
        *,
        draws: int = 10,
        seed: int = 0,
        batch_size: int = 8,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size: found {batch_size}, expected at least 1.")
        self.sampler = posterior.sampler(draws=draws, seed=seed)
        if self.sampler.gradients:
            raise DrawError("lm-eval: found draws of the answers alone, expected draws of the weights; pass draws=0.")
        if posterior.temperature != 1:
            warnings.warn(
                f"lm-eval: the temperature of the posterior, {posterior.temperature:.4g}, belongs to the choices of "
                "its own task and is not applied.",
                BayestuneWarning,
                stacklevel=2,
            )
        super().__init__(pretrained=posterior.model, backend="causal", tokenizer=tokenizer, batch_size=batch_size)

    def _by_draw(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], *, greedy: bool, progress: bool
    ) -> tuple[Tensor, Tensor]:
        """Call `continuation_log_probs` with contexts cut from the left, as lm-eval cuts them."""
        continuations, cut = [], 0
        for _, context, targets in requests:
            if len(targets) > self.max_length:
                limit = f"at most {self.max_length}, the positions of the model"
                raise DataError(f"lm-eval: found a continuation of {len(targets)} tokens, expected {limit}.")
            whole = context + targets
            cut += len(whole) > self.max_length + 1
            continuations.append(Continuation(inputs=tuple(whole[-self.max_length - 1 : -1]), targets=tuple(targets)))
        if cut:
            found = f"{cut} of {len(requests)} texts are longer than the {self.max_length} positions of the model"
            warnings.warn(f"lm-eval: {found}: their beginnings are cut off.", BayestuneWarning, stacklevel=2)
        asked: dict[str, Any] = {"batch_size": self.batch_size, "greedy": greedy, "progress": progress}
        return continuation_log_probs(self.model, self.sampler, continuations, **asked)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        by_draw, greedy = self._by_draw(requests, greedy=True, progress=not disable_tqdm)
        return list(zip(_averaged(by_draw).tolist(), greedy.tolist(), strict=True))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each document, in nats."""
        windows, documents = [], []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            limits = {"prefix_token": self.prefix_token_id, "max_seq_len": self.max_length, "context_len": 1}
            pairs = [make_disjoint_window(pair) for pair in get_rolling_token_windows(token_list=tokens, **limits)]
            windows += [(None, *pair) for pair in pairs]
            documents += [number] * len(pairs)
        by_draw, _ = self._by_draw(windows, greedy=False, progress=not disable_tqdm)
        sums = by_draw.new_zeros(len(by_draw), len(requests)).index_add_(1, torch.tensor(documents), by_draw)
        return _averaged(sums).tolist()

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Raise an error: the average over draws is defined only for given continuations."""
        raise _no_generation([str(request.task_name) for request in requests])

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Raise an error: lm-eval's cache is keyed by the texts alone, so it would mix runs and draws."""
        raise ConfigError("use_cache: found a cache of answers, which ignores the run and its draws; leave it out.")


def _averaged(by_draw: Float[Tensor, "draws texts"]) -> Float[Tensor, " texts"]:
    return by_draw.logsumexp(0) - math.log(len(by_draw))


def _no_generation(tasks: Sequence[str]) -> ConfigError:
    names = ", ".join(sorted(set(tasks)))
    expected = "tasks that score given answers (multiple_choice, loglikelihood, loglikelihood_rolling)"
    return ConfigError(f"tasks: found {names}, which generate text, expected {expected}.")


class Tasks(TaskManager):
    """The tasks that lm-eval knows, and those that YAML files in your own folder define."""

    def named(self, names: str) -> list[str]:
        """Return the tasks, groups and tags in a comma-separated list, in which ``*`` stands for anything.

        Raises:
            ConfigError: no task has one of the names.
        """
        found: list[str] = []
        for name in filter(None, map(str.strip, names.split(","))):
            matching = self.match_tasks([name])
            if not matching:
                raise ConfigError(
                    f"tasks: found {name!r}, which lm-eval does not know; `lm-eval ls tasks` lists them."
                )
            found += [each for each in matching if each not in found]
        if not found:
            raise ConfigError("tasks: found no name, expected tasks of lm-eval, such as arc_easy,hellaswag.")
        return found

    def load(self, task_list: Any) -> Any:
        """Load the rows of tasks.

        Raises:
            DataError: the rows cannot be loaded.
            ConfigError: a task generates text.
        """
        try:
            found = super().load(task_list)
        except Exception as error:  # datasets raises many types for a data set that it cannot load
            names = ", ".join(map(str, task_list))
            raise DataError(f"tasks {names}: lm-eval cannot load them: {one_line(error)}") from error
        generating = [name for name, task in found["tasks"].items() if task.OUTPUT_TYPE == "generate_until"]
        if generating:
            raise _no_generation(generating)
        return found


def ask(
    run: Run, tasks: Tasks, names: Sequence[str], *, draws: int, seed: int = 0, batch_size: int = 8, **options: Any
) -> dict[str, Any]:
    """Evaluate a run on tasks of lm-eval, in the run's own precision, and return lm-eval's results.

    lm-eval seeds the global random state, which some tasks use to shuffle their rows, so its prompts are the same as
    for any other model. The draws do not depend on that state.

    Args:
        run: a run of a causal language model.
        tasks: the known tasks.
        names: the names of the tasks to evaluate.
        draws, seed, batch_size: as in `PosteriorLM`.
        options: arguments of `lm_eval.simple_evaluate`, such as `num_fewshot`, `limit` and `apply_chat_template`.

    Raises:
        TaskError: the run's model answers with a head of its own instead of a language-model head.
        ConfigError, DataError, DrawError: as `PosteriorLM` and `Tasks`.
    """
    if not run.task.generates:
        raise TaskError(
            f"lm-eval: found task {run.task.name} with a head of its own ({type(run.task).__name__}), expected a "
            "run of a causal language model, whose next tokens are scored."
        )
    lm = PosteriorLM(run.posterior, run.task.tokenizer, draws=draws, seed=seed, batch_size=batch_size)
    with autocast(run.experiment):
        return simple_evaluate(lm, tasks=list(names), task_manager=tasks, log_samples=False, **options)


def tables(results: dict[str, Any]) -> str:
    """Return lm-eval's results as its own text tables: by task, and by group if there are groups."""
    return "\n".join(make_table(results, column) for column in ("results", "groups") if results.get(column))


def record(results: dict[str, Any], run: Run, folder: Path, **asked: Any) -> dict[str, Any]:
    """Return the results as plain JSON values for a file; numbers that are not finite become None.

    Args:
        results: what `ask` returned.
        run: the run.
        folder: the run's folder.
        asked: further values that the results depend on, such as draws and seed.
    """
    kept = {name: results[name] for name in _KEPT if name in results}
    posterior = folder / POSTERIOR
    return {
        "run": str(folder),
        "model": run.experiment.model,
        "method": run.experiment.method.name,
        **asked,
        "sha256": {"adapter": file_sha256(posterior / TENSOR_FILE), "manifest": file_sha256(posterior / MANIFEST)},
        "versions": versions() | {"lm_eval": importlib.metadata.version("lm_eval")},
        "hardware": hardware(),
        "lm_eval": json.loads(json.dumps(kept, default=float), parse_constant=lambda _: None),
    }
