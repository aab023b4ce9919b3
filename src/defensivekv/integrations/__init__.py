"""Engines that DefensiveKV works inside of."""
