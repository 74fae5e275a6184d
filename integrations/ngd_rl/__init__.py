"""TRPO for Stable-Baselines3 on the NaturalCG step."""
