"""Stores of past experience that learners sample from.

replay         a ring of the newest transitions: uniform and prioritised, n-step returns, sequences; what learners use
batch          what is sampled
lanes          where the rows of each environment lie
observations   each observation stored once, stacks of frames rebuilt
marks          what can be sampled, found without looking at everything
priorities     a sum tree
storage        memory or disk
device         a GPU
turn           one thread at a time
"""
