"""How long prompt and answer may be: what the model reaches, or what the KV cache of a DP rank holds where that is less."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moesaic.launch.http.errors import ApiError
from moesaic.launch.http.job import FieldNames, fit_plan
from moesaic.launch.http.sampling import ModelLimits, make_plan

LIMITS = ModelLimits(vocab_size=100, context_length=512, kv_tokens=1000, eos_token_ids=())
NAMES = FieldNames(prompt="messages", max_tokens="max_tokens")


@pytest.mark.parametrize(("kv_tokens", "new"), [(1000, 412), (160, 60)])
def test_an_answer_without_a_length_fills_the_smaller_of_the_two(kv_tokens: int, new: int) -> None:
    limits = replace(LIMITS, kv_tokens=kv_tokens)

    assert fit_plan(make_plan({"max_new_tokens": None}, limits), 100, limits, NAMES).max_new_tokens == new


def test_a_request_that_no_rank_can_hold_is_told_what_decides_that() -> None:
    limits = replace(LIMITS, kv_tokens=160)
    for values, num_prompt in (({"max_new_tokens": 61}, 100), ({}, 160)):
        with pytest.raises(ApiError) as caught:
            fit_plan(make_plan(values, limits), num_prompt, limits, NAMES)
        assert caught.value.status == 400
        assert "KV cache of a DP rank holds 160 tokens (--max-total-tokens" in caught.value.message
