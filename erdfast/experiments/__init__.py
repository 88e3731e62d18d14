"""Experiments that test a claim on data where the answer is known; each is an entry point that can be resumed."""
