"""Programs that measure; each prints a table and writes its figures with `--json FILE`. See `--help` of each."""
