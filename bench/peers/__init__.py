"""Contenders of bench.peers.compare, one file each, and the program they run in. None imports another file of this
project, but for `magicdec`: the others run in environments that do not have it."""
