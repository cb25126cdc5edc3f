"""A worker without a model: the step protocol, a latency table for its times, a hash for its
tokens, and every rule of the protocol checked. Needs numpy and pyzmq, never torch."""
