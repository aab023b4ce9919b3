"""Prompts read by rivals, in turns: the time to the first token, and what eviction adds to it."""

import time
from collections.abc import Callable

from defensivekv.bench.caches import head_size
from defensivekv.bench.contenders import Contender, readers
from defensivekv.bench.plan import BenchPlan
from defensivekv.bench.records import CellRecord, Outcome
from defensivekv.bench.rivals.registry import Field
from defensivekv.bench.roofline import Roofline, prefill_flops
from defensivekv.errors import DefensiveKVError

_WARMUP_TOKENS = 256


def measure_prefill(
    field: Field, plan: BenchPlan, roofline: Roofline, length: int, tokens: int, say: Callable[[str], None]
) -> CellRecord:
    """All rivals with one prompt of that many tokens, after a short one that is not counted."""
    started = time.perf_counter()
    contenders = readers(field.rivals, plan)
    samples: dict[int, list[float]] = {number: [] for number in range(len(contenders))}
    ended: dict[int, Outcome] = {}
    for number, contender in enumerate(contenders):
        reason = contender.rival.missing()
        if reason is not None:
            ended[number] = contender.outcome("missing", reason=reason)
    for turn in range(-1, plan.prefill_repeats):
        for number, contender in enumerate(contenders):
            if number in ended:
                continue
            say(f"{contender.label}, turn {turn + 1} of {plan.prefill_repeats}")
            try:
                contender.rival.start()
                taken = contender.rival.read(
                    contender.prompt(tokens if turn >= 0 else min(_WARMUP_TOKENS, tokens), plan)
                )
            except Exception as error:  # whatever goes wrong with a rival is a result
                said = str(error) if isinstance(error, DefensiveKVError) else f"{type(error).__name__}: {error}"
                ended[number] = contender.outcome("failed", reason=said)
                continue
            if turn >= 0:
                samples[number].append(taken)
    floor = _floor(field, roofline, tokens)

    def outcome(number: int, contender: Contender) -> Outcome:
        return ended.get(number) or contender.outcome(samples_s=tuple(samples[number]), floor_s=floor)

    return CellRecord(
        kind="prefill",
        length=length,
        batch=1,
        filled=tokens,
        wall_s=round(time.perf_counter() - started, 1),
        outcomes=tuple(outcome(*each) for each in enumerate(contenders)),
    )


def _floor(field: Field, roofline: Roofline, tokens: int) -> float | None:
    facts, model = field.host.facts, field.host.model
    if facts.read_bytes is None:
        return None
    text = model.config.get_text_config(decoder=True)
    embeddings = [model.get_input_embeddings(), model.get_output_embeddings()]
    sizes = {each.weight.data_ptr(): each.weight.numel() for each in embeddings if each is not None}
    width = text.num_attention_heads * head_size(text)
    return prefill_flops(facts.parameters, sum(sizes.values()), tokens, facts.layers, width) / roofline.matmul
