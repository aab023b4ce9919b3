"""What a deployment asks for, in `--additional-config '{"defensivekv": {...}}'`."""

import difflib
from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr, ValidationError

from defensivekv.errors import InvalidInputError
from defensivekv.policies import Policy, policy

KEY = "defensivekv"
"""Of the additional configuration."""


class Options(BaseModel):
    """The plugin's options, which are those of `defensivekv.policy` and one more.

    head_groups: the key-value heads of a layer compete in this many groups, each for its share of the budget; 1: all
    together, as the methods have it. With tensor parallelism, a rank holds whole groups.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    policy: StrictStr = "defensivekv"
    budget: StrictFloat | StrictInt | StrictStr | None = None
    window_size: StrictInt | None = None
    scoring: StrictStr | None = None
    aggregation: StrictStr | None = None
    weighting: StrictStr | None = None
    allocation: StrictStr | None = None
    protect_window: StrictBool = True
    profile: StrictStr | None = None
    head_groups: StrictInt = Field(default=1, ge=1)

    @classmethod
    def parse(cls, given: object) -> Self:
        """Reads the options, and makes the policy once. Raises InvalidInputError, or what `policy` raises."""
        example = '{"policy": "defensivekv", "budget": 0.2}'
        if not isinstance(given, Mapping):
            raise InvalidInputError(f"additional_config {KEY!r} is {given!r}: give options, such as {example}")
        try:
            options = cls(**given)
        except (ValidationError, TypeError) as error:
            if isinstance(error, TypeError):
                raise InvalidInputError(f"additional_config {KEY!r}: {error}") from None
            told = "; ".join(
                f"{'.'.join(map(str, problem['loc'][:1]))}: {problem['msg']}" for problem in error.errors()
            )
            known = ", ".join(cls.model_fields)
            near = {
                found
                for name in given
                if str(name) not in cls.model_fields
                for found in difflib.get_close_matches(str(name), cls.model_fields, n=1)
            }
            if near:
                told += f" (did you mean {' or '.join(map(repr, sorted(near)))}?)"
            raise InvalidInputError(f"additional_config {KEY!r}: {told}; known are {known}, as in {example}") from None
        options.make_policy()
        return options

    def make_policy(self) -> Policy:
        """The policy that is asked for. Raises as `defensivekv.policy`, and for policies that cannot be served."""
        given: dict[str, Any] = self.model_dump(exclude={"policy", "budget", "head_groups"})
        made = policy(self.policy, self.budget, **given)
        check_servable(made)
        return made


def check_servable(policy: Policy) -> None:
    """Raises InvalidInputError, with the reason, for a policy that an engine cannot follow."""
    if policy.budget.is_adaptive or policy.budget.kind == "bytes":
        why = (
            "its size is not known when blocks are given out"
            if policy.budget.is_adaptive
            else "it bounds all that a sequence ever holds, generated tokens counted, which all stay here"
        )
        raise InvalidInputError(
            f"budget {policy.budget} cannot be served by vLLM: {why}; give a share such as 0.2, or entries per head "
            "such as 1024"
        )
    if policy.reads_twice:
        reason = "has every prompt read a second time, which an engine does not do"
    elif policy.scorer.sees not in ("window", "nothing") and not policy.budget.is_full:
        reason = f"scores by {policy.scorer.description}, of which a chunk of the prompt shows a part"
    else:
        return
    raise InvalidInputError(
        f"policy {policy.name!r} cannot be served by vLLM: it {reason}; choose another, such as 'defensivekv'"
    )
