"""The `orchestrate` command: one small file per group of commands, each loaded when it is used.

`main` (the table of commands) -> `run`, `runs`, ... -> `connection` -> the worker's gateway, or Temporal itself.
"""
