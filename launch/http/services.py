"""What every endpoint needs, made once per server and handed to each of them."""

from __future__ import annotations

from dataclasses import dataclass

from moesaic.launch.http.client import RankClient
from moesaic.launch.http.config import HttpConfig
from moesaic.launch.http.errors import ApiError, bad_request
from moesaic.launch.http.metrics import Metrics
from moesaic.launch.http.request_log import RequestLog
from moesaic.launch.http.sampling import ModelLimits
from moesaic.launch.http.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Services:
    config: HttpConfig
    client: RankClient
    tokenizer: Tokenizer | None
    metrics: Metrics
    limits: ModelLimits
    log: RequestLog

    def need_tokenizer(self, param: str) -> Tokenizer:
        """The tokenizer; a 400 blaming `param` where the server has none."""
        if self.tokenizer is None:
            raise bad_request(
                f"{param} needs a tokenizer, but {self.config.tokenizer_path or self.config.model_path} has no "
                "tokenizer.json: this server takes token ids only (input_ids of /generate, prompt of /v1/completions)",
                param,
            )
        return self.tokenizer

    def check_model(self, name: str | None) -> str:
        """The model's name as served; routers send null or leave it out."""
        served = self.config.served_model_name
        if name is not None and name not in (served, self.config.model_path, "default", ""):
            raise ApiError(
                404,
                f"the model {name!r} does not exist; this server has {served!r}",
                param="model",
                code="model_not_found",
            )
        return served


def make_services(config: HttpConfig, client: RankClient, tokenizer: Tokenizer | None) -> Services:
    """All ranks must be ready: they say how much KV they have."""
    limits = ModelLimits(
        vocab_size=config.vocab_size,
        context_length=config.context_length,
        kv_tokens=min(rank.max_total_num_tokens for rank in client.ready.values()),
        eos_token_ids=config.eos_token_ids,
    )
    metrics = Metrics(config.served_model_name, client.loads, client.health.rebalance, config.role)
    log = RequestLog(config.log_requests_level)
    return Services(config=config, client=client, tokenizer=tokenizer, metrics=metrics, limits=limits, log=log)
