"""Many runs, by any number of processes on any machines that share a folder; whatever is killed, nothing is lost.

claims: who works on which run. ledger: what has become of each. presets: which runs. worker: one after the other.
local, ray_engine: several at once. progress: how it goes. command: the command line.
"""
