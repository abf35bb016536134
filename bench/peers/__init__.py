"""aiorl and what a user would take instead, on the same work, in turns: `python -m bench.peers`.

`works` says what is held equal, `lineup` who takes part, `report` what comes out; `ours` drives aiorl and every other
module one peer, each through its public interface, in a process and a virtual environment of its own.
"""
