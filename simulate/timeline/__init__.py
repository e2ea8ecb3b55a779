"""Rounds of N unequal devices, event by event: who computes, exchanges and waits when. Needs numpy, never torch."""
