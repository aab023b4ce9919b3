"""The decision on a prompt that is read at once: its scores, layer by layer, and what stays."""

import warnings
from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from defensivekv.errors import DefensiveKVWarning, InvalidInputError
from defensivekv.integrations.competition import Competition
from defensivekv.integrations.transformers.texts import Texts
from defensivekv.policies import Observation, Policy
from defensivekv.policies.evidence import Evidence
from defensivekv.policies.policy import bytes_per_token
from defensivekv.types import Kept, Values

_PAD_RUN = 4


class PromptDecision:
    """The decision on one prompt.

    texts: the rows of the batch; none before the prompt. bytes_per_token: of all evicted layers together.
    """

    def __init__(self, policy: Policy, layers: tuple[int, ...]) -> None:
        self.policy = policy
        self.texts = Texts()
        self.bytes_per_token = 0
        self._competition = Competition(policy, layers)

    @property
    def is_underway(self) -> bool:
        """Whether scores wait for those of further layers."""
        return self._competition.is_underway

    def add(self, layer: int, observation: Observation, evidence: Sequence[Evidence] | None = None) -> dict[int, Kept]:
        """Scores a layer; gives what stays in the layers from which something goes now.

        evidence: of each row, where it was gathered before.
        """
        layers = self._competition.layers
        if layer == layers[0]:
            check_pads(observation.values, observation.valid)
        size = bytes_per_token(observation) * len(layers)
        rows, self.bytes_per_token = _row_lengths(observation), size
        shares = tuple(self.policy.row_share(tokens, size) for tokens in rows)
        try:
            scored = self.policy.score(
                observation, index=layers.index(layer), num_layers=len(layers), evidence=evidence
            )
        except InvalidInputError as error:
            raise InvalidInputError(f"layer {layer}: {error}") from None
        kept = self._competition.add(layer, scored, shares)
        self.texts = Texts(rows, tuple(self._competition.shares or shares), observation.valid)
        if layer == layers[-1]:
            say_what_is_whole(self.policy, self.texts)
        return kept

    def fork(self) -> "PromptDecision":
        """The same decision, to go on by itself."""
        twin = PromptDecision(self.policy, self._competition.layers)
        twin.texts, twin.bytes_per_token = self.texts, self.bytes_per_token
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
