"""`orchestrate rl bench`: the stacks side by side on the same work, with the bound beside every number.

BenchConfig -> cells, interleaved -> a process for each -> CellRun -> Results -> results.json, report.html, a table
"""
