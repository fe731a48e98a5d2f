"""The command line: one file per subcommand, thin over the Python API. Imports no torch at module level."""
