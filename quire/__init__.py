"""Quire: LLM inference from paged KV memory, as a set of small services."""
