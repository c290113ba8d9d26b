"""Unsupervised pre-training for Stable-Baselines3."""
