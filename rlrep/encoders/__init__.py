"""Encoders: raw observations in, features out. One file a family; `make_encoder` builds one from its spec."""

from rlrep.encoders.base import Encoder, encoders, load_encoder, make_encoder

__all__ = ["Encoder", "encoders", "load_encoder", "make_encoder"]
