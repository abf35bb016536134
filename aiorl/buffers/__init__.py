"""Stores of past experience that learners sample from.

replay   a ring of the newest transitions, sampled uniformly, with n-step returns
"""
