"""What `python -m lmc` can do: `doctor` looks at this machine, `bench` measures it.

Both need no engine, open no socket and leave nothing behind.
"""
