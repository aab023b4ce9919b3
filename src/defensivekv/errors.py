"""What can go wrong, as one tree. Each message says what to do about it.

DefensiveKVError
├── BudgetError            a budget that means nothing, or that cannot hold the observation window
├── UnknownPolicyError     no policy of that name
├── InvalidInputError      tensors or prompts that cannot be used (shapes, NaN, no tokens, pads without a mask)
├── UnsupportedModelError  a model, layer or weight that this package cannot evict from
├── CacheError             a cache used where or when it cannot answer correctly
├── ContextError           a stored context that another model, tokenizer or dtype made, or that is not there
│   └── DamagedContextError    one whose file is not what was written
└── RivalError             another package, measured beside this one, that could not be run

DefensiveKVWarning is the category of every warning.
"""


class DefensiveKVError(Exception):
    """Base of every error that this package raises on purpose."""


class BudgetError(DefensiveKVError, ValueError):
    """A budget that is not a share, a count or a size, or that is below the observation window."""


class UnknownPolicyError(DefensiveKVError, ValueError):
    """No policy of that name; the message lists the nearest ones."""


class InvalidInputError(DefensiveKVError, ValueError):
    """Tensors, prompts or options that cannot be used."""


class UnsupportedModelError(DefensiveKVError, ValueError):
    """A model that eviction cannot be applied to, named with the reason."""


class CacheError(DefensiveKVError, RuntimeError):
    """A cache used with another model, after `disable`, or cropped into what was evicted."""


class ContextError(DefensiveKVError, ValueError):
    """A stored context that cannot be used here; the message names what differs."""


class DamagedContextError(ContextError):
    """A file of a stored context that is not what was written: cut off, or with a bit that flipped. Named."""


class RivalError(DefensiveKVError, RuntimeError):
    """A rival of `defensivekv bench` that did not start, failed, or does not do what was asked."""


class DefensiveKVWarning(UserWarning):
    """Something works, but not as one might think."""
