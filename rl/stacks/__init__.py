"""Who hosts the parts of a run: each module opens a `rl.stack.Stack` of its own kind, found by its name."""
