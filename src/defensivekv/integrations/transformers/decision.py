"""The decision on a prompt that is read at once: its scores, layer by layer, and what stays."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from defensivekv.errors import DefensiveKVWarning, InvalidInputError
from defensivekv.integrations.competition import Competition
from defensivekv.integrations.transformers.texts import Texts
from defensivekv.policies import Observation, Policy
from defensivekv.policies.evidence import Evidence
from defensivekv.policies.policy import bytes_per_token
from defensivekv.policies.standing import LayerStanding
from defensivekv.types import Kept, Values

_PAD_RUN = 4


@dataclass(frozen=True)
class Stays:
    """Of one layer, what stays, and what is known of it; None: as before."""

    kept: Kept
    facts: Float[Tensor, "b h m f"] | None


class PromptDecision:
    """The decision on one prompt.

    keeps_scores: whether it is kept where each entry stands, so that further ones can be evicted later.
    texts: the rows of the batch; none before the prompt. bytes_per_token: of all evicted layers together. standings:
    of each layer, what is kept beside that of its entries.
    """

    def __init__(self, policy: Policy, layers: tuple[int, ...], *, keeps_scores: bool = False) -> None:
        self.policy = policy
        self.keeps_scores = keeps_scores
        self.texts = Texts()
        self.bytes_per_token = 0
        self.standings: dict[int, LayerStanding] = {}
        self._facts: dict[int, Float[Tensor, "b h m f"]] = {}
        self._competition = Competition(policy, layers)

    @property
    def is_underway(self) -> bool:
        """Whether scores wait for those of further layers."""
        return self._competition.is_underway

    def add(self, layer: int, observation: Observation, evidence: Sequence[Evidence] | None = None) -> dict[int, Stays]:
        """Scores a layer; gives what stays in the layers from which something goes now.

        evidence: of each row, where it was gathered before.
        """
        layers = self._competition.layers
        if layer == layers[0]:
            check_pads(observation.values, observation.valid)
        size = bytes_per_token(observation) * len(layers)
        rows, self.bytes_per_token = _row_lengths(observation), size
        shares = tuple(self.policy.row_share(tokens, size) for tokens in rows)
        is_repeated = self.policy.scorer.sees == "reconstruction"
        try:
            scored = self.policy.score(
                observation,
                index=layers.index(layer),
                num_layers=len(layers),
                evidence=evidence,
                with_standing=self.keeps_scores and (evidence is not None or not is_repeated),
            )
        except InvalidInputError as error:
            raise InvalidInputError(f"layer {layer}: {error}") from None
        facts, standing = scored.facts(observation.valid), scored.standing
        if facts is not None and standing is not None:
            self._facts[layer], self.standings[layer] = facts, standing
        if not self.policy.budget.is_adaptive:
            scored = replace(scored, rows=())
        kept = self._competition.add(layer, scored, shares)
        self.texts = Texts(rows, tuple(self._competition.shares or shares), observation.valid)
        if layer == layers[-1]:
            say_what_is_whole(self.policy, self.texts)
        return {number: Stays(stays, self._facts.pop(number, None)) for number, stays in kept.items()}

    def select_rows(self, index: Sequence[int]) -> None:
        """Makes the batch the rows of these numbers, which may repeat."""
        self.texts = self.texts.select_rows(index)
        self.standings = {layer: standing.select_rows(index) for layer, standing in self.standings.items()}

    def fork(self) -> "PromptDecision":
        """The same decision, to go on by itself."""
        twin = PromptDecision(self.policy, self._competition.layers, keeps_scores=self.keeps_scores)
        twin.texts, twin.bytes_per_token = self.texts, self.bytes_per_token
        twin.standings = dict(self.standings)
        return twin


def say_what_is_whole(policy: Policy, texts: Texts) -> None:
    """Warns of prompts that are too short to be evicted from."""
    whole = [tokens for tokens, share in zip(texts.tokens, texts.shares, strict=True) if share >= 1]
    if whole and not policy.budget.is_full and not policy.budget.is_adaptive:
        lengths = ", ".join(str(tokens) for tokens in sorted(set(whole)))
        warnings.warn(
            f"{len(whole)} of {len(texts.tokens)} prompts ({lengths} tokens) are kept whole: "
            f"too short for budget {policy.budget}",
            DefensiveKVWarning,
            stacklevel=8,
        )


def _row_lengths(observation: Observation) -> tuple[int, ...]:
    if observation.valid is None:
        return (observation.num_tokens,) * observation.keys.shape[0]
    return tuple(observation.valid.sum(-1).tolist())


def check_pads(values: Values, valid: Bool[Tensor, "b t"] | None) -> None:
    """Raises where some rows of an unmasked batch begin with one token repeated: pads that nobody named.

    A cache is not told the tokens. Causal attention over equal tokens gives equal outputs, so that equal tokens at
    the start show as equal values. Padding leaves its longest row as it is and fills the others with one token; text
    that begins with the same token `_PAD_RUN` times in some rows only is rare, and does so with a token of its own.
    """
    b, _, t = values.shape[:3]
    if valid is not None or b == 1 or t < _PAD_RUN:
        return
    start = values[:, :, :_PAD_RUN].float()
    first = start[:, :, :1]
    repeated = torch.isclose(start, first, rtol=1e-4, atol=1e-6).flatten(1).all(-1)
    if not bool(repeated.any()) or bool(repeated.all()):
        return
    fillers = first[repeated]
    if bool(torch.isclose(fillers, fillers[:1], rtol=1e-4, atol=1e-6).all()):
        rows = ", ".join(str(row) for row in repeated.nonzero().flatten().tolist())
        raise InvalidInputError(
            f"rows {rows} of the batch begin with one token repeated, which looks like padding, and the attention mask "
            "hides none of it: pass the tokenizer's attention_mask to generate() or to the model, or, where a prompt "
            "really begins so, pass it in a batch of its own"
        )
