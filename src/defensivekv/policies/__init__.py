"""What to keep: pure tensor functions, composed by frozen dataclasses. Knows no model, cache or engine."""

from defensivekv.policies.observation import Observation
from defensivekv.policies.policy import Policy
from defensivekv.policies.presets import policies, policy, summary

__all__ = ["Observation", "Policy", "policies", "policy", "summary"]
