"""Defects of the client, the proxy and what they send to a server."""

from typing import Any

import numpy as np

from mutants.defect import defect, replace, wrap

WIRE = "bayestune.serving.wire"
CLIENT = "bayestune.serving.client.Client"
TESTS = "serving/test_client.py"
PROXY = "serving/test_proxy.py"


@defect(TESTS, "every_request")
def the_prompt_cache_is_left_on() -> None:
    wrap(f"{WIRE}.LlamaCpp._body", lambda right: lambda *args, **own: right(*args, **own) | {"cache_prompt": True})


@defect(TESTS, "predicts_what_predict_does")
def every_draw_is_answered_by_the_first() -> None:
    def wrong(right: Any) -> Any:
        return lambda self, key, asked: right(self, None if key is None else 0, asked)

    wrap(f"{WIRE}.LlamaCpp.questions", wrong)


@defect(TESTS, "predicts_what_predict_does and text")
def an_answer_of_several_tokens_counts_its_first_alone() -> None:
    wrap(f"{WIRE}.Asked.steps", lambda right: lambda self, choice: right(self, choice)[:1])


@defect(TESTS, "record_of_another")
def the_file_of_a_draw_is_not_compared() -> None:
    replace(f"{CLIENT}._check_file", lambda self, draw, adapter: None)


@defect(TESTS, "changes_nothing")
def a_draw_without_effect_is_averaged() -> None:
    replace(f"{CLIENT}._check_probes", lambda self: None)


@defect("serving/test_vllm.py", "without_a_token")
def a_missing_token_has_probability_0() -> None:
    replace(f"{WIRE}.told", lambda found, token: found.get(token, -np.inf))


@defect(PROXY, "one_token or longer_answer")
def the_proxy_answers_with_the_first_draw() -> None:
    wrap("bayestune.serving.averaged.next_token", lambda right: lambda found, *more: right(found[:1], *more))


@defect(PROXY, "dead_server")
def the_proxy_does_not_look_at_what_came_back() -> None:
    wrap(f"{CLIENT}.check", lambda right: lambda self: None if hasattr(self, "adapters") else right(self))
