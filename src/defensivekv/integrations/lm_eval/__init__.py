"""DefensiveKV under the lm-evaluation-harness: importing this package registers the model type "defensivekv".

The harness discovers no plug-ins, so a program that imports this package must start it: `defensivekv lm-eval`, or
`python -m defensivekv.integrations.lm_eval run --model defensivekv --model_args ...` with the harness's own options.
"""

from defensivekv.errors import InvalidInputError
from defensivekv.integrations.lm_eval.boundary import CONTEXT_FIELDS, SplitPrompt, split_prompt

try:
    from defensivekv.integrations.lm_eval.adapter import MODEL_TYPE, EvictingLM
except ImportError as error:
    raise InvalidInputError(
        f"the lm-evaluation-harness cannot be imported ({error}): pip install defensivekv[lm-eval]"
    ) from error

__all__ = ["CONTEXT_FIELDS", "MODEL_TYPE", "EvictingLM", "SplitPrompt", "split_prompt"]
