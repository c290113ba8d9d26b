"""Reusable encoders: raw observations in, features out."""
