"""What to keep: pure tensor functions, composed by frozen dataclasses. Knows no model, cache or engine."""

from defensivekv.policies.observation import Observation
from defensivekv.policies.parts import PARTS
from defensivekv.policies.policy import Policy
from defensivekv.policies.presets import policies, policy, summary

__all__ = ["PARTS", "Observation", "Policy", "policies", "policy", "summary"]
