"""Comparison with other engines. `programs/` has one file per contender, and the driver they run in. Only
`programs/magicdec.py` imports other files of this project: the others run in environments without it."""
