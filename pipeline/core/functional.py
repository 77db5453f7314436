"""Networks as pure functions of their parameters, with batch-norm statistics in plain sight.

S support examples, Q query examples, D features.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pipeline.core.types import Params, Statistics

BatchNormMode = Literal["running", "inductive_support", "transductive"]
"""Whose statistics normalise the queries.

running: population statistics of training episodes, fixed before any test example is seen
(inductive). inductive_support: those of the episode's support set (inductive). transductive: those
of the episode's own queries, which lets the queries inform each other.
"""

Precision = Literal["fp32", "bf16"]

BACKBONE = "backbone."


@dataclass(frozen=True)
class Model:
    """A backbone without weights of its own, and the rule by which its batch norms work."""

    skeleton: nn.Module
    """Called as skeleton(x, statistics) -> (features, statistics); lives on `meta`."""
    feature_dim: int
    batch_norm: BatchNormMode
    statistics: Statistics | None = None
    """Population statistics, once measured; only mode `running` uses them."""
    precision: Precision = "fp32"
    """Of the network's convolutions and matrix products; all else is computed in fp32."""

    def with_statistics(self, statistics: Statistics | None) -> Model:
        """This model with other population statistics (None: as in training)."""
        return replace(self, statistics=statistics)

    def features(
        self, params: Params, x: Tensor, statistics: Statistics | None = None
    ) -> tuple[Tensor, Statistics]:
        """Features [B, D] of pictures [B, C, H, W], and the statistics of this batch.

        Args:
            statistics: normalise with these; None: with the batch's own.
        """
        weights = {
            name.removeprefix(BACKBONE): value
            for name, value in params.items()
            if name.startswith(BACKBONE)
        }
        with self._autocast(x):
            features, collected = functional_call(
                self.skeleton, weights, (x, statistics), strict=True
            )
        return features.to(x.dtype), collected

    def _autocast(self, x: Tensor) -> AbstractContextManager[Any]:
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(x.device.type, torch.bfloat16)

    def embed_support(self, params: Params, x: Tensor) -> tuple[Tensor, Statistics | None]:
        """Support features [S, D], and the statistics with which queries are to be normalised."""
        if self.batch_norm == "running" and self.statistics is not None:
            return self.features(params, x, self.statistics)[0], self.statistics
        if self.batch_norm == "inductive_support":
            return self.features(params, x)
        return self.features(params, x)[0], None

    def embed_query(self, params: Params, x: Tensor, statistics: Statistics | None) -> Tensor:
        """Query features [Q, D], under the statistics that `embed_support` returned."""
        return self.features(params, x, statistics)[0]

    def embed_task(
        self, params: Params, support_x: Tensor, query_x: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Support and query features for training.

        Mode `running` has no population statistics yet in training: support and queries are one
        batch, as in ordinary supervised training, and only evaluation uses fixed statistics.
        """
        if self.batch_norm == "running" and self.statistics is None:
            joint, _ = self.features(params, torch.cat([support_x, query_x]))
            return joint[: len(support_x)], joint[len(support_x) :]
        support, statistics = self.embed_support(params, support_x)
        return support, self.embed_query(params, query_x, statistics)


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of rows whose largest logit is at the label."""
    return (logits.argmax(-1) == labels).float().mean().detach()
