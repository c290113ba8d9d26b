"""Encoders: raw observations in, features out. One file a family; `make_encoder` builds one from its spec."""

from rlrep.encoders.base import Encoder, State, encoders, load_encoder, make_encoder
from rlrep.encoders.recurrent import RecurrentEncoder, WorldModel, load_belief

__all__ = [
    "Encoder",
    "RecurrentEncoder",
    "State",
    "WorldModel",
    "encoders",
    "load_belief",
    "load_encoder",
    "make_encoder",
]
