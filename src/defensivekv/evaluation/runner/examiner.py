"""One model that answers samples and tells all about it; runs in the user's process or on another machine."""

import copy
import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from defensivekv.errors import UnsupportedModelError
from defensivekv.evaluation.records import Record, Timing
from defensivekv.evaluation.runner.answering import Answerer, Answers
from defensivekv.evaluation.runner.cells import Cell
from defensivekv.evaluation.runner.facts import Facts, find_facts
from defensivekv.evaluation.runner.plan import RunPlan
from defensivekv.evaluation.runner.protocol import Prompt, check_room, make_prompt
from defensivekv.evaluation.runner.reading import AnyCache, Compressed, Read, pad_left, read_prompts
from defensivekv.evaluation.runner.scribe import Answered, Scribe
from defensivekv.evaluation.tasks.sample import Sample, Unreadable
from defensivekv.integrations.transformers import ContextStore, check_supported, disable
from defensivekv.integrations.transformers.contexts.wrapping import find_wrapping


@dataclass(frozen=True)
class Outcome:
    """A sample's record, and its times where it was answered."""

    record: Record
    timing: Timing | None


@dataclass(frozen=True)
class _Ready:
    """A sample whose tokens are known. place: in its window."""

    place: int
    sample: Sample
    prompt: Prompt

    @property
    def kin(self) -> tuple[object, ...]:
        """What samples of one batch have in common; a conversation has a batch of its own."""
        sample = self.sample
        alone = self.place if sample.in_turns else -1
        return alone, len(sample.questions), sample.max_new_tokens, sample.stop, sample.is_bare


class Examiner:
    """Answers windows of samples under a plan.

    Raises UnsupportedModelError where the plan has policies that the model cannot be evicted with, and
    InvalidInputError for a template that the tokenizer does not have.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, plan: RunPlan) -> None:
        if any(not setting.is_stock for setting in plan.settings()):
            check_supported(model)
        self.tokenizer = tokenizer
        self._model, self._plan = model, plan
        self._wrapping = find_wrapping(tokenizer, plan.template)
        self.facts: Facts = find_facts(model, plan, template=self._wrapping.name)
        self._answerer = Answerer(model, tokenizer)
        self._store = None if plan.store is None else ContextStore(plan.store, plan.store_max_bytes)
        self._scribe = Scribe(self.facts, plan)

    def close(self) -> None:
        """Gives the model its own attention back."""
        disable(self._model)

    @torch.no_grad()
    def examine(self, cell: Cell, window: Sequence[Sample | Unreadable]) -> list[Outcome]:
        """An outcome for each sample, in order. What goes wrong with a sample is in its record.

        Raises UnsupportedModelError, which no sample is to blame for, and what the user interrupts with.
        """
        outcomes: dict[int, Outcome] = {}
        groups: dict[tuple[object, ...], list[_Ready]] = {}
        for place, sample in enumerate(window):
            if isinstance(sample, Unreadable):
                outcomes[place] = self._failure(cell, sample, f"unreadable: {sample.reason}")
                continue
            try:
                ready = _Ready(place, sample, self._prompt(sample))
            except Exception as error:
                outcomes[place] = self._failure(cell, sample, _describe(error))
            else:
                groups.setdefault(ready.kin, []).append(ready)
        for group in groups.values():
            outcomes |= self._examine_group(cell, group)
        return [outcomes[place] for place in range(len(window))]

    def _prompt(self, sample: Sample) -> Prompt:
        return make_prompt(
            self.tokenizer,
            sample,
            self._wrapping,
            max_context_tokens=self._plan.max_context_tokens,
            max_positions=self.facts.max_positions,
        )

    def _examine_group(self, cell: Cell, group: list[_Ready]) -> dict[int, Outcome]:
        """Together; where that fails, one at a time, to find whose failure it is."""
        try:
            answered = self._answer(cell, group)
            return {
                ready.place: Outcome(*self._scribe.success(cell, ready.sample, each, rows=len(group)))
                for ready, each in zip(group, answered, strict=True)
            }
        except UnsupportedModelError:
            raise
        except Exception as error:
            message = _describe(error)
        # Outside of the handler, whose traceback keeps the failed batch's memory.
        gc.collect()
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(group) == 1:
            return {group[0].place: self._failure(cell, group[0].sample, message, group[0].prompt)}
        alone = [self._examine_group(cell, [ready]) for ready in group]
        return {place: outcome for each in alone for place, outcome in each.items()}

    def _failure(self, cell: Cell, sample: Sample | Unreadable, error: str, prompt: Prompt | None = None) -> Outcome:
        return Outcome(self._scribe.failure(cell, sample, error, prompt), None)

    def _answer(self, cell: Cell, group: list[_Ready]) -> list[Answered]:
        if group[0].sample.in_turns:
            return [self._converse(cell, group[0])]
        ask = self._ask_aware if self._plan.query_aware else self._ask_blind
        read, given = ask(cell, group)
        steps = [gap for answers in given for gap in answers.steps]
        count = len(group[0].sample.questions)
        found = []
        for row, ready in enumerate(group):
            # All questions in one batch, or a batch for each of them.
            together = len(given) == 1
            rows = given[0].rows[row * count : (row + 1) * count] if together else [each.rows[row] for each in given]
            found.append(
                Answered(
                    truncated=ready.prompt.truncated,
                    # Of several compressions, the one that held the most.
                    held=max((each.held[row] for each in read), key=lambda held: held.cache_bytes),
                    outputs=[answer.text for answer in rows],
                    prefill_seconds=sum(each.seconds for each in read) / len(group),
                    steps=steps,
                    new_tokens=sum(len(answer.ids) for answer in rows),
                )
            )
        return found

    def _ask_blind(self, cell: Cell, group: list[_Ready]) -> tuple[list[Compressed], list[Answers]]:
        """Each question from the compressed documents; all at once where documents are read in batches too."""
        read = self._read(cell, group, [ready.prompt.context for ready in group])
        sample = group[0].sample
        count = len(sample.questions)
        if self._plan.rows > 1:
            cache: Any = read.cache
            cache.batch_repeat_interleave(count)
            turns = [turn for ready in group for turn in ready.prompt.turns]
            ids, mask = (of_prompt.repeat_interleave(count, dim=0) for of_prompt in (read.ids, read.mask))
            return [read.compressed], [self._ask(cache, ids, mask, turns, sample)]
        given = []
        for number in range(count):
            forked = read.cache if number == count - 1 else copy.deepcopy(read.cache)
            turns = [ready.prompt.turns[number] for ready in group]
            given.append(self._ask(forked, read.ids, read.mask, turns, sample))
        return [read.compressed], given

    def _ask_aware(self, cell: Cell, group: list[_Ready]) -> tuple[list[Compressed], list[Answers]]:
        """Each question from a compression that has seen it."""
        compressed, given = [], []
        for number in range(len(group[0].sample.questions)):
            turns = [ready.prompt.turns[number] for ready in group]
            # The last token is left for the answer to begin from.
            prompts = [ready.prompt.context + turn[:-1] for ready, turn in zip(group, turns, strict=True)]
            read = self._read(cell, group, prompts)
            compressed.append(read.compressed)
            last = [turn[-1:] for turn in turns]
            given.append(self._ask(read.cache, read.ids, read.mask, last, group[0].sample))
            del read
        return compressed, given

    def _read(self, cell: Cell, group: list[_Ready], prompts: list[list[int]]) -> Read:
        return read_prompts(
            self._model,
            self.tokenizer,
            cell.setting,
            prompts,
            pad=self._answerer.pad,
            wrapping=group[0].prompt.wrapping,
            store=self._store,
        )

    def _ask(self, cache: AnyCache, ids: Tensor, mask: Tensor, turns: list[list[int]], sample: Sample) -> Answers:
        new_ids, new_mask = pad_left(turns, self._answerer.pad, ids.device)
        return self._answerer.answer(
            cache,
            torch.cat((ids, new_ids), dim=1),
            torch.cat((mask, new_mask), dim=1),
            max_new_tokens=sample.max_new_tokens,
            stop=sample.stop,
        )

    def _converse(self, cell: Cell, ready: _Ready) -> Answered:
        """Turn after turn on one cache; what was said before stays in it whole."""
        prompt, sample = ready.prompt, ready.sample
        turns = list(prompt.turns)
        context = list(prompt.context)
        if self._plan.query_aware:
            context, turns[0] = context + turns[0][:-1], turns[0][-1:]
        read = self._read(cell, [ready], [context])
        said, given = list(context), []
        for turn in turns:
            said += turn
            check_room(len(said) + sample.max_new_tokens, self.facts.max_positions)
            ids, mask = pad_left([said], self._answerer.pad, read.ids.device)
            answers = self._answerer.answer(
                read.cache, ids, mask, max_new_tokens=sample.max_new_tokens, stop=sample.stop
            )
            given.append(answers)
            new = answers.rows[0].ids
            # The last token was never read, so it can still be left out.
            said += new if prompt.wrapping.keeps_end or new[-1] not in self._answerer.ends else new[:-1]
        return Answered(
            truncated=prompt.truncated,
            held=read.compressed.held[0],
            outputs=[answers.rows[0].text for answers in given],
            prefill_seconds=read.compressed.seconds,
            steps=[gap for answers in given for gap in answers.steps],
            new_tokens=sum(len(answers.rows[0].ids) for answers in given),
        )


def _describe(error: Exception) -> str:
    """The error's type and message."""
    return f"{type(error).__name__}: {error}"
