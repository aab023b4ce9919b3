"""What a run is made of, as a user writes it down: a file, or options of the command line."""

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from defensivekv.budget import Budget
from defensivekv.errors import InvalidInputError
from defensivekv.evaluation.runner.cells import Setting
from defensivekv.evaluation.tasks.task import TaskOptions
from defensivekv.integrations.transformers.contexts.wrapping import Template
from defensivekv.integrations.transformers.prefill import check_chunk_size
from defensivekv.policies import policy as make_policy
from defensivekv.policies.steps import check_evicts_in_steps

PACKAGED_BATCH_SIZE = 8
"""Rows of a batch with the packaged model, whose documents are short and of one length."""

Option = bool | int | str

_LONGEST_TITLE = 120

_CHUNK_SIZE = "chunk_size"


def _as_list(value: object) -> object:
    """One thing, or several between commas, as a list."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value if value is None or isinstance(value, list | tuple) else [value]


def _as_texts(value: object) -> object:
    listed = _as_list(value)
    return [part if isinstance(part, str) else repr(part) for part in listed] if isinstance(listed, list) else listed


class PolicyPlan(BaseModel):
    """A policy without its budget.

    name: one of `defensivekv.policies()`. options: keywords of `defensivekv.policy`, such as `aggregation` or
    `window_size`, and `chunk_size`: tokens of a prompt that are read at a time. label: what tables call it; the name
    with its options where none is given.

    Written as a mapping `{name: snapkv, aggregation: defensive, label: defensive SnapKV}`, or in short as
    `snapkv+aggregation=defensive`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    label: str = ""
    options: dict[str, Option] = {}

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: object) -> object:
        if isinstance(value, str):
            name, *parts = value.split("+")
            pairs = [part.partition("=") for part in parts]
            if any(not key or not given for key, _, given in pairs):
                raise ValueError(f"{value!r} is not understood: write name+option=value, or name alone")
            if any(key == "name" for key, _, _ in pairs):
                raise ValueError(f"{value!r} names a policy twice")
            value = {"name": name, **{key: given if key == "profile" else _option(given) for key, _, given in pairs}}
        if not isinstance(value, Mapping) or "options" in value:
            return value
        fields = {key: given for key, given in value.items() if key in ("name", "label")}
        return fields | {"options": {key: given for key, given in value.items() if key not in fields}}

    @model_validator(mode="after")
    def _check_label(self) -> "PolicyPlan":
        if self.name != "full" and self.title.casefold() == "full":
            raise ValueError("the label 'full' is the full cache's: choose another")
        if len(self.title) > _LONGEST_TITLE:
            raise ValueError(f"a label has at most {_LONGEST_TITLE} characters")
        return self

    @property
    def title(self) -> str:
        """The label, or the name with its options; the yardstick is always "full"."""
        if self.name == "full":
            return self.name
        return self.label or "+".join([self.name, *(f"{key}={given}" for key, given in self.options.items())])

    def make(self, budget: str) -> Setting:
        """The policy at that budget. Raises UnknownPolicyError, BudgetError or InvalidInputError."""
        known = [name for name in inspect.signature(make_policy).parameters if name not in ("name", "budget")]
        unknown = [key for key in self.options if key not in (*known, _CHUNK_SIZE)]
        if unknown:
            names = ", ".join((*known, _CHUNK_SIZE))
            raise InvalidInputError(f"policy {self.title!r}: no option {unknown[0]!r}; known are {names}")
        options = {key: value for key, value in self.options.items() if key != _CHUNK_SIZE}
        policy, chunk_size = make_policy(self.name, budget, **options), self.options.get(_CHUNK_SIZE)  # type: ignore[arg-type]
        if _CHUNK_SIZE in self.options:
            check_chunk_size(policy, chunk_size)
        if (chunk_size is not None and not policy.budget.is_full) or policy.budget.kind == "bytes":
            check_evicts_in_steps(policy)
        return Setting(self.title, self.name, policy, self.options, chunk_size)  # type: ignore[arg-type]


def _option(text: str) -> Option:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    return int(text) if text.isdigit() else text


class RunPlan(BaseModel):
    """Every policy at every budget on every task, with one model.

    model: hub name or folder; None: the packaged model. dtype, device, trust_remote_code: as of `defensivekv ask`.
    tasks: as `make_tasks` takes them. budgets: as `Budget.parse` takes them; 1.0 stands for the policy "full", since
    all policies are the same there. num_samples, lengths, seed, data, split: of `TaskOptions`. batch_size: rows read
    at a time; None: 1, or 8 for the packaged model. max_context_tokens: longer documents lose their middle; None:
    they are kept, and fail where the model has no room. store, store_max_bytes: a `ContextStore` where compressed
    documents are looked for and kept, one row at a time; answers do not depend on it. query_aware: the question is
    compressed with the document.
    template: as of `compress`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    tasks: Annotated[tuple[str, ...], BeforeValidator(_as_list), Field(min_length=1)]
    policies: Annotated[tuple[PolicyPlan, ...], BeforeValidator(_as_list), Field(min_length=1)]
    budgets: Annotated[tuple[str, ...], BeforeValidator(_as_texts)] = ()
    num_samples: Annotated[int, Field(ge=1)] | None = None
    lengths: Annotated[tuple[Annotated[int, Field(ge=1)], ...] | None, BeforeValidator(_as_list)] = None
    seed: int = 42
    data: str | None = None
    split: str | None = None
    batch_size: Annotated[int, Field(ge=1)] | None = None
    max_context_tokens: Annotated[int, Field(ge=2)] | None = None
    store: str | None = None
    store_max_bytes: str | None = None
    query_aware: bool = False
    template: Template = "auto"

    @model_validator(mode="after")
    def _check_store(self) -> "RunPlan":
        if self.store is not None and self.rows > 1:
            raise ValueError("a store keeps documents that were read one at a time: leave batch_size out")
        if self.store is None and self.store_max_bytes is not None:
            raise ValueError("store_max_bytes is for a store: name one")
        return self

    @property
    def rows(self) -> int:
        """Rows of a batch, the default resolved."""
        return self.batch_size or (PACKAGED_BATCH_SIZE if self.model is None and self.store is None else 1)

    @property
    def task_options(self) -> TaskOptions:
        """What the tasks are told."""
        data = None if self.data is None else Path(self.data)
        return TaskOptions(self.num_samples, self.lengths, self.seed, data, self.split)

    def settings(self) -> list[Setting]:
        """Policies at budgets, each policy's budgets together; "full" once.

        Raises UnknownPolicyError, BudgetError or InvalidInputError, so that a run stops before it starts.
        """
        budgets = list({budget: text for text in self.budgets for budget in [Budget.parse(text)]}.items())
        plans = list(self.policies)
        if any(budget.is_full for budget, _ in budgets) and all(plan.name != "full" for plan in plans):
            plans.insert(0, PolicyPlan(name="full"))
        titles = [plan.title.casefold() for plan in plans]
        twice = next((title for title in titles if titles.count(title) > 1), None)
        if twice is not None:
            raise InvalidInputError(f"policy {twice!r} is named twice: give each of them a label of its own")
        found: list[Setting] = []
        for plan in plans:
            texts = ["1.0"] if plan.name == "full" else [text for budget, text in budgets if not budget.is_full]
            found += [plan.make(text) for text in texts]
            if not texts:
                raise InvalidInputError(f"policy {plan.title!r} needs a budget: give budgets such as 0.2")
        return found


def make_plan(fields: Mapping[str, Any]) -> RunPlan:
    """The plan of these fields. Raises InvalidInputError that names the field."""
    try:
        return RunPlan.model_validate(dict(fields))
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, each['loc'])) or 'plan'}: {each['msg']}" for each in error.errors()]
        known = ", ".join(RunPlan.model_fields)
        raise InvalidInputError(f"the plan of the run: {'; '.join(problems)} (fields are {known})") from None


def load_plan(path: Path) -> dict[str, Any]:
    """The fields of a plan, from a YAML file or the `run.json` of an earlier run. Raises InvalidInputError."""
    try:
        text = path.read_text(encoding="utf-8")
        fields = json.loads(text)["plan"] if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError, KeyError, TypeError) as error:
        raise InvalidInputError(f"cannot read {str(path)!r} as a plan: {type(error).__name__}: {error}") from error
    if not isinstance(fields, dict) or not all(isinstance(key, str) for key in fields):
        raise InvalidInputError(f"{str(path)!r} holds no plan: write fields such as `tasks: [ruler]`")
    return fields
