"""Evaluation: how good a representation, its data and the agents built on it are, and how sure that is."""
