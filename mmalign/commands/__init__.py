"""The verbs of the command line, a module per group. They hold no logic: each loads a config and calls one function."""
