"""Runs in virtual time: the real scheduler, simulated workers, and an event queue for a clock.

Needs numpy and the scheduler's packages; imports services inside functions.
"""
